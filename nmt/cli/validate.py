"""nmt-validate: measure a model on a split of its task."""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmt.checkpoints.find_folder import find_model, moved_path
from nmt.checkpoints.model_config import CONFIG_NAME, read_model_config, with_untold_paths
from nmt.cli.command import announce_models, run_command
from nmt.config.command_line import is_flag
from nmt.config.fields import Option
from nmt.config.mapping import asks_for, parse_command, path_options, peek, print_version
from nmt.config.untold import is_untold
from nmt.errors import UserError
from nmt.options import TrainConfig
from nmt.task import NamesItsData, load_task

PROG = "nmt-validate"
_USAGE = f"""usage: {PROG} MODEL [--split NAME] [options of nmt-train]

Measure a model on a split of its task, as nmt-train does after an epoch, and print a JSON line.

  MODEL
      The model folder, such as RUN/checkpoints/best, or the folder of a run, whose best checkpoint is taken.
  --split NAME
      train, valid (unless given), or test
  --help, --version
      Print this text, or the version, and stop.

The other options are those that the model was trained with; any that is given here goes before: another data
directory (`{PROG} MODEL DATA`), --val-dir, --batch-size, --num-workers, --device. `nmt-train --help` explains
them. With torchrun several processes share the split."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        if asks_for(arguments, "--version"):
            print_version(PROG)
        if asks_for(arguments, "--help", "-h"):
            print(_USAGE)
            raise SystemExit(0)
        if not arguments or is_flag(arguments[0]):
            raise UserError(f"MODEL must be named first, but is not. See `{PROG} --help`.")
        (folder,) = announce_models(PROG, [find_model(Path(arguments[0]))])
        split, options = _take_split(arguments[1:])
        config = _find_data(_configure(folder, options), folder, options, split=split)
        from nmt.update.validation import validate_model

        results = validate_model(
            folder, config, split=split, say=lambda line: print(f"{PROG}: {line}", file=sys.stderr)
        )
        if results is not None:  # on rank 0
            print(json.dumps({"split": split, **results}))

    run_command(PROG, body)


def _configure(folder: Path, options: Sequence[str]) -> TrainConfig[Any]:
    """Return the configuration that the model was trained with, changed by the given options."""
    mapping = with_untold_paths(read_model_config(folder))
    task_options = load_task(mapping["task"])
    return parse_command(
        TrainConfig[task_options],  # type: ignore[valid-type]
        options,
        prog=PROG,
        description="",
        known=(str(folder / CONFIG_NAME), mapping),
    )


def _find_data(
    config: TrainConfig[Any], folder: Path, given: Sequence[str], *, split: str
) -> TrainConfig[Any]:
    """Look for the data of a run that was moved together with its data, and say where they are now.

    Paths in the given arguments are taken as they are.

    Raises:
        UserError: The data are not there; the text says how to name them.
    """
    options = config.task_options
    for option in _data_options(options, split):
        path = functools.reduce(getattr, (*option.owner, option.name), options)
        if not isinstance(path, Path) or str(path) in given:
            continue
        # First, since a relative path may lead to other data from here.
        moved = None
        if not is_untold(path):
            moved = moved_path(path, old_run=config.save_dir, model_folder=folder)
        if moved is not None and not (path.exists() and path.samefile(moved)):
            print(f"{PROG}: {option.key}: {moved} (was {path} when the model was trained)", file=sys.stderr)
            options = _replace(options, (*option.owner, option.name), moved)
        elif not path.exists():
            where = "the model folder does not tell where they are"
            if not is_untold(path):
                where = f"{path}, where it was trained, is not there"
            how = f"{PROG} MODEL {option.label if option.is_positional else f'{option.flag} PATH'}"
            raise UserError(
                f"`{option.key}` must be the data to measure the model on, but {where}. Name it: `{how}`."
            )
    return dataclasses.replace(config, task_options=options)


def _data_options(options: Any, split: str) -> list[Option]:
    """List the options that name data: those that the task says, or else its paths.

    Of inner dataclasses, such as the options of another task within them, only required paths count.
    """
    paths = path_options(type(options))
    if isinstance(options, NamesItsData):
        names = options.data_options(split)
        return [option for option in paths if option.name in names]
    return [option for option in paths if option.is_required or not option.owner]


def _replace(options: Any, names: Sequence[str], value: Any) -> Any:
    """Return a nest of options with another value for one field; `names` lead to it."""
    if len(names) > 1:
        value = _replace(getattr(options, names[0]), names[1:], value)
    return dataclasses.replace(options, **{names[0]: value})


def _take_split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the split, and the other arguments, since nmt-train does not know --split."""
    left: list[str] = []
    is_value = False
    for argument in arguments:
        if not is_value and argument.partition("=")[0] != "--split":
            left.append(argument)
        is_value = argument == "--split"
    if is_value:
        raise UserError(f"`--split` must have a value, but none follows. See `{PROG} --help`.")
    return peek(arguments, "--split") or "valid", left


if __name__ == "__main__":
    main()
