"""Kill a short run at every operation by which it changes the disk, and take it up: a program for test_survival.

Started in the folder `tests`:

    python -m support.crash_injection FOLDER        prints one JSON object

One process imports everything and builds nothing; each run is a fork of it. First a run is left alone and its
operations are counted. Then, for each operation, a run is killed right before it, or half-way through a write, or
finds the disk full, in a folder of its own; the folder is looked at; and the run is taken up and must end like the
one that was left alone.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which the first optimizer imports, for a second: not in every fork

from nmt.checkpoints.run_folder import CheckpointFolder
from nmt.cli.command import run_command
from nmt.data.options import BatchingOptions
from nmt.options import CheckpointOptions, OptimizationOptions, TrainConfig
from nmt.run.run_log import TIMES
from nmt.train_loop import train
from support.disk_faults import KILLED, DiskFaults, Fault
from support.toy_task import PointOptions

# 500 examples in batches of 100: 5 updates an epoch. There is a checkpoint after updates 2, 4, 5, 6, 7 and 8.
CONFIG = TrainConfig(
    task="points",
    task_options=PointOptions(),
    save_dir=Path("run"),
    batching=BatchingOptions(max_tokens=None, batch_size=100, required_batch_size_multiple=1),
    optimization=OptimizationOptions(lr=0.02, warmup_updates=5, max_update=8),
    checkpoints=CheckpointOptions(
        save_interval_updates=2, validate_interval_updates=7, keep_last=2, keep_best=1
    ),
    device="cpu",
    log_interval=1,
)


@dataclass
class Reference:
    """The run that was left alone."""

    operations: list[str]
    files: dict[str, Any]  # what it leaves, times apart
    checkpoints: dict[int, dict[str, Any]]  # all that it wrote, those that it removed again too
    losses: dict[int, float]  # of the validations, by update


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    install_plugin(folder)
    os.fsync = lambda _: None  # for the runs that are not disturbed: see `DiskFaults`
    whole = reference(folder / "whole")
    report: dict[str, Any] = {"operations": len(whole.operations), "failures": []}
    for fault in ("kill before", "kill half-way", "full"):
        cases = [at for at, name in enumerate(whole.operations) if is_case(fault, name)]
        report[fault] = len(cases)
        for at in cases:
            check(whole, folder / f"{fault} {at}", fault, at, report["failures"])
    report |= check_resumed(whole, folder, report["failures"])
    print(json.dumps(report))


def is_case(fault: Fault, operation: str) -> bool:
    return fault == "kill before" or operation.startswith(("write", "open", "mkdir", "symlink", "create"))


def fork(folder: Path, body: Callable[[], None]) -> int:
    """Run `body` in a fork that works in `folder`, and return its exit code; what it says goes to `folder`.err."""
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.chdir(folder)
        said = os.open(f"{folder}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(said, 2)
        body()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def train_quietly() -> None:
    run_command("nmt-train", lambda: train(CONFIG))


def train_with(fault: Fault, at: int) -> Callable[[], None]:
    def body() -> None:
        faults = DiskFaults(Path.cwd(), fault, at)
        faults.install()
        train_quietly()

    return body


def reference(folder: Path) -> Reference:
    """Leave one run alone, count its operations, and another one that keeps all checkpoints."""

    def count() -> None:
        faults = DiskFaults(Path.cwd())
        faults.install()
        train_quietly()
        seen = [*faults.seen]
        Path(f"{folder}.operations").write_text(json.dumps(seen))

    def keep_all() -> None:
        CheckpointFolder.prune = lambda *_: None  # type: ignore[method-assign,assignment]
        train_quietly()

    archive = folder.with_name("archive")
    assert fork(folder, count) == 0 and fork(archive, keep_all) == 0, Path(f"{folder}.err").read_text()
    operations = json.loads(Path(f"{folder}.operations").read_text())
    checkpoints = {
        update: snapshot(archive / "run" / "checkpoints" / f"update-{update:07d}")
        for update in CheckpointFolder(archive / "run" / "checkpoints").updates()
    }
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    losses = {record["update"]: record["loss"] for record in records if record["kind"] == "valid"}
    return Reference(operations, snapshot(folder), checkpoints, losses)


def check(whole: Reference, folder: Path, fault: Fault, at: int, failures: list[str]) -> None:
    """Disturb a run at an operation, look at what it leaves, take it up, and compare; then remove the folder."""
    name = f"{folder.name} ({whole.operations[at]})"
    done = completed(whole.operations[:at])
    code = fork(folder, train_with(fault, at))
    problems = [*bad_end(folder, fault, code), *bad_checkpoints(whole, folder, done)]
    problems += bad_resume(whole, folder)
    failures += [f"{name}: {problem}" for problem in problems]
    if not problems:
        shutil.rmtree(folder)


def check_resumed(whole: Reference, folder: Path, failures: list[str]) -> dict[str, int]:
    """The same for a run that is taken up after it was killed half-way through a checkpoint."""
    written = [at for at, name in enumerate(whole.operations) if name.startswith("write tensors")]
    in_third = next(at for at in written if len(completed(whole.operations[:at])) == 2)
    begun = folder / "begun"
    fork(begun, train_with("kill half-way", in_third))
    counted = folder / "counted"
    shutil.copytree(begun, counted, symlinks=True)

    def count() -> None:
        faults = DiskFaults(Path.cwd())
        faults.install()
        train_quietly()
        seen = [*faults.seen]
        Path(f"{counted}.operations").write_text(json.dumps(seen))

    assert fork(counted, count) == 0
    operations = json.loads(Path(f"{counted}.operations").read_text())
    next_saved = next(at for at, name in enumerate(operations) if completed([name]))
    cases = range(next_saved + 2)
    for at in cases:
        case = folder / f"resumed {at}"
        shutil.copytree(begun, case, symlinks=True)
        code = fork(case, train_with("kill before", at))
        problems = bad_end(case, "kill before", code)
        problems += bad_checkpoints(whole, case, [2, 4, *completed(operations[:at])])
        problems += bad_resume(whole, case)
        failures += [f"resumed {at} ({operations[at]}): {problem}" for problem in problems]
        if not problems:
            shutil.rmtree(case)
    return {"kills of a resumed run": len(cases)}


def completed(operations: list[str]) -> list[int]:
    """Return the updates of the checkpoints that have got their names by these operations."""
    names = [operation.split("/")[-1] for operation in operations if operation.startswith("rename ")]
    return [int(name[8:-4]) for name in names if name.startswith(".update-") and name.endswith(".tmp")]


def bad_end(folder: Path, fault: Fault, code: int) -> list[str]:
    """Say what is wrong with how the disturbed run ended."""
    said = Path(f"{folder}.err").read_text()
    if fault != "full":
        return [] if code == KILLED else [f"exit code {code}: {said}"]
    problems = [] if code == 2 else [f"exit code {code}"]
    last = said.rstrip("\n").split("\n")[-1]
    if not last.startswith("nmt-train: error: ") or "No space left on device" not in last:
        problems.append(f"said last: {last}")
    if "Traceback" in said or "Exception ignored" in said:
        problems.append(f"said: {said}")
    return problems


def bad_checkpoints(whole: Reference, folder: Path, done: list[int]) -> list[str]:
    """Say what is wrong with the checkpoints of a disturbed run that had completed those after updates `done`."""
    checkpoints = CheckpointFolder(folder / "run" / "checkpoints")
    there = checkpoints.updates()
    problems = [
        f"checkpoint {update} is not what was written"
        for update in there
        if snapshot(checkpoints.at(update)) != whole.checkpoints[update]
    ]
    if done and (not there or there[-1] < done[-1]):
        problems.append(f"checkpoint {done[-1]} is lost: {there}")

    def best(updates: list[int]) -> int | None:
        return min(
            (update for update in updates if update in whole.losses), key=whole.losses.get, default=None
        )

    # A link may be one checkpoint behind, but always names one that is there.
    for name, behind, newest in (
        ("last", max(done[:-1], default=None), max(there, default=None)),
        ("best", best(done[:-1]), best(there)),
    ):
        link = checkpoints.path / name
        update = int(link.readlink().name.removeprefix("update-")) if link.is_symlink() else None
        if update is None and behind is not None:
            problems.append(f"`{name}` is missing")
        if update is not None and (update not in there or update not in (behind, newest)):
            problems.append(f"`{name}` is {update}, but must be {behind} or {newest}, of {there}")
    return problems


def bad_resume(whole: Reference, folder: Path) -> list[str]:
    """Take a run up, and say in what its end differs from that of the run that was left alone."""
    code = fork(folder, train_quietly)
    if code:
        return [f"not resumed, exit code {code}: {Path(f'{folder}.err').read_text()}"]
    found = snapshot(folder)
    names = sorted({*found, *whole.files})
    return [f"ends with another {name}" for name in names if found.get(name) != whole.files.get(name)]


def snapshot(folder: Path) -> dict[str, Any]:
    """Return what is in a folder, but for times, and for the lines for people."""
    return {
        str(path.relative_to(folder)): content(path)
        for path in sorted(folder.rglob("*"))
        if path.name != "train.log" and (path.is_symlink() or not path.is_dir())
    }


def content(path: Path) -> Any:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    if path.name == "metrics.jsonl":
        try:
            records = [json.loads(line) for line in path.read_text().splitlines()]
        except json.JSONDecodeError:
            return path.read_bytes()  # half a line: like nothing that a run should leave
        return [{key: value for key, value in record.items() if key not in TIMES} for record in records]
    if path.name == "state.json":
        state = json.loads(path.read_text())
        del state["clock"], state["records_size"]  # times have more or fewer digits
        return state
    return path.read_bytes()


def install_plugin(folder: Path) -> None:
    """Install the task of `support/toy_task.py` under the name `points`."""
    metadata = folder / "plugin" / "points_plugin-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: points-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[nmt.tasks]\npoints = support.toy_task:PointOptions\n")
    sys.path.insert(0, str(metadata.parent))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
