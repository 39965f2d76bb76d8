#!/usr/bin/env python3
"""Show on a configuration of yours, and on this machine, that a run that was stopped ends like one that was not.

    .venv/bin/python scripts/verify_resume.py CONFIG.yaml [--option value ...]
    .venv/bin/python scripts/verify_resume.py --ranks 2 --updates 30 CONFIG.yaml [--option value ...]

Makes some updates (12) of the configuration without a break. Then, for several updates, makes the same run again,
ends it after that update (asked to stop, as SIGTERM asks; or killed) and takes it up. Compared, bit by bit, are
the last checkpoint (weights, optimizer, schedule, metrics, early stopping, the place in the data) and
metrics.jsonl; only times may differ. So that something happens in so few updates, it validates and saves every few
of them, and `max-update` is their number; all else is the configuration's. `save-dir` is not touched: runs go to a
temporary folder (set TMPDIR for another disk).

On a GPU add `--deterministic`. Exit code: 0 if all are equal, 1 if one differs, 2 for what is wrong with the
configuration.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nmt.cli.command import run_command
from nmt.config.mapping import parse_command, peek, read_yaml
from nmt.errors import UserError
from nmt.options import TrainConfig
from nmt.task import load_task

PROG = "verify_resume"
KILLED = 137


def main() -> None:
    """Run the parent, which compares, or (with --end) one of the runs that it starts."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes that share each update")
    parser.add_argument(
        "--updates",
        type=int,
        default=12,
        help="length of the run, at least 6; below 12 it is ended in two places alone",
    )
    parser.add_argument("--end", nargs=2, metavar=("HOW", "UPDATE"), help=argparse.SUPPRESS)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="options of nmt-train")
    given = parser.parse_args()
    if given.updates < 6 or given.ranks < 1:
        parser.error("--updates must be at least 6, and --ranks at least 1")
    is_right = True

    def body() -> None:
        nonlocal is_right
        config = read_config(given.config, given.overrides, given.updates)
        if given.end is None:
            is_right = verify(config, given)
        else:
            run(config, how=given.end[0], at=int(given.end[1]))

    run_command(PROG, body)
    raise SystemExit(0 if is_right else 1)


def read_config(path: Path, overrides: Sequence[str], num_updates: int) -> TrainConfig[Any]:
    task_options = load_task(peek(overrides, "--task") or read_yaml(path).get("task") or "translation")
    config: TrainConfig[Any] = parse_command(
        TrainConfig[task_options],  # type: ignore[valid-type]
        ["--config", str(path), *overrides],
        prog=PROG,
        description="The options of nmt-train.",
    )
    checkpoints = replace(
        config.checkpoints,
        validate_interval_updates=num_updates // 3,
        save_interval_updates=max(num_updates // 6, 2),
        keep_last=num_updates,
    )
    optimization = replace(config.optimization, max_update=num_updates, max_epoch=None)
    return replace(config, checkpoints=checkpoints, optimization=optimization, log_interval=3)


def run(config: TrainConfig[Any], *, how: str, at: int) -> None:
    """Train as one of the ranks; after update `at` ask for the end, or end without a word."""
    from nmt.system.signals import StopRequest
    from nmt.train_loop import train
    from nmt.trainer import Trainer

    stop = StopRequest(PROG)
    make_update = Trainer.train_step

    def make_update_and_end(self: Trainer, *args: Any, **kwargs: Any) -> None:
        make_update(self, *args, **kwargs)
        if self.update == at and how == "stopped":
            stop.request(PROG)
        if self.update == at and how == "killed":
            os._exit(KILLED)

    Trainer.train_step = make_update_and_end  # type: ignore[method-assign]
    train(config, stop=stop)


def verify(config: TrainConfig[Any], given: argparse.Namespace) -> bool:
    last = given.updates
    third = last // 3
    # Right at the start; where a validation is due; between two checkpoints; shortly before the end.
    ends = [
        ("stopped", 1),
        ("stopped", third),
        ("killed", third + 1),
        ("stopped", last // 2 + 1),
        ("killed", last - 1),
    ]
    if last < 12:  # a quick look
        ends = ends[1:3]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start(given, folder / "whole")
        whole = outcome(folder / "whole", last)
        place = json.loads((checkpoint(folder / "whole", last) / "state.json").read_text())["batches"]
        print(f"{last} updates, {given.ranks} x {config.device}, epoch {place['epoch']} at the end")
        print(f"{'ended':>20} {'at checkpoint':>14} {'epoch':>6} {'examples':>9}  differs in")
        is_right = True
        for how, at in ends:
            name = f"{how} after {at}"
            start(given, folder / name, how=how, at=at)
            updates = sorted(int(path.name[7:]) for path in (folder / name / "checkpoints").glob("update-*"))
            state = {"epoch": "-", "examples_consumed": "-"}
            if updates:
                state = json.loads((checkpoint(folder / name, updates[-1]) / "state.json").read_text())[
                    "batches"
                ]
            start(given, folder / name)
            found = outcome(folder / name, last)
            differing = [key for key in sorted({*found, *whole}) if found.get(key) != whole.get(key)]
            is_right = is_right and not differing
            print(
                f"{name:>20} {updates[-1] if updates else '-':>14} {state['epoch']:>6} "
                f"{state['examples_consumed']:>9}  {', '.join(differing) or 'nothing'}"
            )
    print("Equal, bit by bit." if is_right else "NOT equal.")
    return is_right


def start(given: argparse.Namespace, folder: Path, *, how: str = "finished", at: int = 0) -> None:
    """Make a run in processes of its own, up to its end or to `at`."""
    command = [sys.executable]
    if given.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(given.ranks)]
    command += [__file__, "--updates", str(given.updates), "--end", how, str(at), str(given.config)]
    command += [*given.overrides, "--save-dir", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode and how != "killed":
        line = result.stderr.rstrip("\n").split("\n")[-1].removeprefix(f"{PROG}: error: ")
        raise UserError(f"a run of {given.updates} updates failed: {line}")


def checkpoint(folder: Path, update: int) -> Path:
    return folder / "checkpoints" / f"update-{update:07d}"


def outcome(folder: Path, update: int) -> dict[str, Any]:
    """Return what a run has come to, times apart: the files of its last checkpoint and its records."""
    from nmt.run.run_log import TIMES

    found: dict[str, Any] = {}
    for path in sorted(checkpoint(folder, update).rglob("*")):
        if path.name == "state.json":
            state = json.loads(path.read_text(encoding="utf-8"))
            del state["clock"], state["records_size"]  # times, and how long they are
            found[path.name] = state
        elif path.is_file() and path.name != "config.yaml":
            found[path.name] = path.read_bytes()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]
    # What a resume has changed, such as the end of the run, is recorded where there was one.
    return {**found, "metrics.jsonl": [record for record in records if record["kind"] != "resume"]}


if __name__ == "__main__":
    main()
