"""nmt-validate: measure a model on a split of its task."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from nmt.cli.command import run_command
from nmt.config import parse_command, peek, read_yaml
from nmt.errors import UserError
from nmt.options import TrainConfig
from nmt.task import load_task

PROG = "nmt-validate"
_USAGE = f"""usage: {PROG} MODEL [--split NAME] [OPTIONS of nmt-train]

Measure a model on a split of its task, as nmt-train does after an epoch, and print a JSON line.

  MODEL         the model folder, such as RUN/checkpoints/best
  --split NAME  train, valid (unless given), or test

The options are those that the model was trained with; any that is given here goes before: another data directory,
--val-dir, --batch-size, --num-workers, --device. With torchrun several processes share the split."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        if "--help" in arguments or "-h" in arguments:
            print(_USAGE)
            raise SystemExit(0)
        if not arguments or arguments[0].startswith("-"):
            raise UserError("A model folder must be named first, but is not. Such as RUN/checkpoints/best.")
        folder, options = Path(arguments[0]), arguments[1:]
        split = peek(options, "--split") or "valid"
        config_path = folder / "config.yaml"
        if not config_path.is_file():
            raise UserError(f"`{folder}` must be a model folder, but has no config.yaml.")
        task_options = load_task(read_yaml(config_path).get("task", "translation"))
        config = parse_command(
            TrainConfig[task_options],  # type: ignore[valid-type]
            ["--config", str(config_path), *_without_split(options)],
            prog=PROG,
            description="",
        )
        from nmt.validation import validate_model

        results = validate_model(
            folder, config, split=split, say=lambda line: print(f"{PROG}: {line}", file=sys.stderr)
        )
        if results is not None:  # on rank 0
            print(json.dumps({"split": split, **results}))

    run_command(PROG, body)


def _without_split(arguments: Sequence[str]) -> list[str]:
    """Leave out --split and its value, which nmt-train does not know."""
    left: list[str] = []
    is_value = False
    for argument in arguments:
        if not is_value and argument.partition("=")[0] != "--split":
            left.append(argument)
        is_value = argument == "--split"
    return left


if __name__ == "__main__":
    main()
