"""The configuration in a model folder: what the model is and how it was trained, without paths of the machine.

Model folders are published, so they name no place. Where the data are is written in the run's own folder, and read
from there as long as the model lies in the run. Imports no torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmt.checkpoints.find_folder import CHECKPOINTS_NAME
from nmt.config.fields import list_options
from nmt.config.mapping import from_mapping, path_options, read_yaml, write_yaml
from nmt.config.untold import UNTOLD, is_untold
from nmt.errors import DamagedError
from nmt.options import TrainConfig
from nmt.task import load_task

CONFIG_NAME = "config.yaml"


def write_model_config(config: TrainConfig[Any], folder: Path) -> None:
    """Write the configuration of a model into its folder."""
    write_yaml(config, folder / CONFIG_NAME, with_paths=False)


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a model as text by key, with the task; with paths if the model lies in its run.

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
    if checkpoints.name == CHECKPOINTS_NAME and of_run.is_file():
        told = read_yaml(of_run)
        for option in list_options(_config_type(task)):
            is_missing = option.is_path and option.key not in mapping
            if (is_missing or is_untold(mapping.get(option.key))) and option.key in told:
                mapping[option.key] = told[option.key]
    return mapping


def load_model_config(folder: Path) -> TrainConfig[Any]:
    """Return the configuration of a model. A path that is written nowhere becomes a remark that says so.

    Raises:
        UserError: A file is missing or damaged.
    """
    mapping = with_untold_paths(read_model_config(folder))
    return from_mapping(_config_type(mapping["task"]), mapping, where=str(folder / CONFIG_NAME))


def with_untold_paths(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a model with `UNTOLD` for each required path that is missing."""
    paths = path_options(_config_type(mapping["task"]))
    return {**{option.key: UNTOLD for option in paths if option.is_required}, **mapping}


def _config_type(task: str) -> type[TrainConfig[Any]]:
    options_type = load_task(task)
    return TrainConfig[options_type]  # type: ignore[valid-type]
