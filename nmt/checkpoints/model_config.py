"""The configuration in a model folder: what the model is and how it was trained, without paths of the machine.

Model folders are published, so they name no place: where a run has its data is written in the run's own folder,
and taken from there as long as the model lies in it. Imports no torch.
"""

from pathlib import Path
from typing import Any

from nmt.config.mapping import from_mapping, path_options, read_yaml, write_yaml
from nmt.errors import DamagedError
from nmt.options import TrainConfig
from nmt.task import load_task

CONFIG_NAME = "config.yaml"
_CHECKPOINTS = "checkpoints"
_UNTOLD = "(a path that the model folder does not tell)"


def write_model_config(config: TrainConfig[Any], folder: Path) -> None:
    """Write the configuration of a model into its folder."""
    write_yaml(config, folder / CONFIG_NAME, with_paths=False)


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a model as text by key, with the task; paths too, if it lies in its run.

    Raises:
        UserError: A file is missing or damaged.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise DamagedError(f"`{path}` must be a file of the checkpoint, but is missing.")
    mapping = read_yaml(path)
    task = mapping.setdefault("task", "translation")
    if not isinstance(task, str):
        raise DamagedError(f"{path}: `task` must be one name, but is not. Take the whole model folder again.")
    checkpoints = folder.resolve().parent
    of_run = checkpoints.parent / CONFIG_NAME
    if checkpoints.name == _CHECKPOINTS and of_run.is_file():
        told = read_yaml(of_run)
        for option in path_options(_config_type(task)):
            if option.key not in mapping and option.key in told:
                mapping[option.key] = told[option.key]
    return mapping


def load_model_config(folder: Path) -> TrainConfig[Any]:
    """Return the configuration of a model; a path that is told nowhere is one that says so.

    Raises:
        UserError: A file is missing or damaged.
    """
    mapping = read_model_config(folder)
    config_type = _config_type(mapping["task"])
    untold = {option.key: _UNTOLD for option in path_options(config_type) if option.is_required}
    return from_mapping(config_type, {**untold, **mapping}, where=str(folder / CONFIG_NAME))


def _config_type(task: str) -> type[TrainConfig[Any]]:
    options_type = load_task(task)
    return TrainConfig[options_type]  # type: ignore[valid-type]
