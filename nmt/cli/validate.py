"""nmt-validate: measure a model on a split of its task."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from nmt.cli.command import run_command
from nmt.config import parse_command, peek
from nmt.errors import UserError
from nmt.model_config import CONFIG_NAME, read_model_config
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
        if not (folder / CONFIG_NAME).is_file():
            raise UserError(f"`{folder}` must be a model folder, but has no {CONFIG_NAME}.")
        mapping = read_model_config(folder)
        task_options = load_task(mapping["task"])
        config = parse_command(
            TrainConfig[task_options],  # type: ignore[valid-type]
            _without_split(options),
            prog=PROG,
            description="",
            known=(str(folder / CONFIG_NAME), {"save-dir": str(folder), **mapping}),
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
