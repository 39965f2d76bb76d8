"""Model folders: the weights, the configuration and the assets of a model, ready to use.

    model.safetensors, config.yaml, the task's assets

A checkpoint of a run is a model folder, too, with more files for resuming (`nmt.checkpoints.run_folder`).
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nmt.checkpoints.find_folder import MODEL_NAME, find_model
from nmt.checkpoints.model_config import CONFIG_NAME, load_model_config, write_model_config
from nmt.checkpoints.tensor_file import load_tensors, read_header, save_tensors
from nmt.checkpoints.weights import weights
from nmt.errors import DamagedError, UserError, shown
from nmt.options import TrainConfig
from nmt.system.new_folder import new_folder
from nmt.system.places import check_new_folder
from nmt.task import Task

_KINDS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")  # safetensors' names

_MOST_NAMES_A_WEIGHT = 4  # while a model is made, it may make parameters that it shares or throws away


def load_model(folder: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, Task[Any]]:
    """Return the model of a model folder, or of a run's best checkpoint, in evaluation mode, and its task.

    Raises:
        UserError: The folder lacks a file, is cut short, has another format version, or does not fit together.
    """
    folder = find_model(Path(folder)).folder
    task: Task[Any] = load_config(folder).task_options.build(folder)
    return build_model(task, folder).to(device).eval(), task


def load_config(folder: Path) -> TrainConfig[Any]:
    """Return the configuration that a model folder was trained with.

    Raises:
        UserError: The folder lacks a file or has another format version.
    """
    read_header(folder / MODEL_NAME)  # first: options of a newer release may be unknown here
    return load_model_config(folder)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights of a model folder into a model, which must have the same names and shapes.

    Raises:
        UserError: It has others, or the file is missing or damaged. The model then stays as it was.
    """
    expected = weights(model)
    loaded = read_weights(expected, folder)
    for name, tensor in expected.items():
        tensor.copy_(loaded[name])


def read_weights(expected: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return the weights of a model folder.

    Args:
        expected: Tensors of the names, shapes and types that the weights must have; their content does not matter.
        folder: The model folder.

    Raises:
        UserError: The weights are others, or the file is missing or damaged.
    """
    path = folder / MODEL_NAME
    _check_shapes(expected, path)
    return load_tensors(path)


def build_model(task: Task[Any], folder: Path) -> nn.Module:
    """Make the model of a task with the weights of a model folder.

    Raises:
        UserError: They do not fit together. This is checked before memory is taken for the model, since a damaged
            configuration can ask for a model of any size.
    """
    num_weights = len(read_header(folder / MODEL_NAME))
    try:
        with torch.device("meta"), _at_most(_MOST_NAMES_A_WEIGHT * num_weights):
            sizes = weights(task.build_model())
    except _LargerModelError:
        raise UserError(
            f"`{folder / MODEL_NAME}` must hold the weights of the model that {folder / CONFIG_NAME} describes, "
            f"but holds {num_weights:,} and the model has more."
        ) from None
    except Exception:  # some models compute while they are made, which needs tensors with content
        pass
    else:
        _check_shapes(sizes, folder / MODEL_NAME)
    model = task.build_model()
    load_weights(model, folder)
    return model


def average_models(folders: Sequence[Path], output: Path) -> None:
    """Write a model folder whose weights are the mean of others', formed in float64.

    Integers (batch norm's counters) are taken from the last folder.
    """
    config = load_config(folders[-1])
    task: Task[Any] = config.task_options.build(folders[-1])
    model = build_model(task, folders[-1])
    total: dict[str, Tensor] = {}
    for folder in folders:
        load_weights(model, folder)
        for name, tensor in weights(model).items():
            if tensor.is_floating_point():
                share = tensor.double() / len(folders)
                total[name] = total[name] + share if name in total else share
            else:
                total[name] = tensor.clone()
    mean = {name: total[name].to(tensor.dtype) for name, tensor in weights(model).items()}
    write_model_folder(output, mean, config=config, task=task)


def write_model_folder(
    folder: Path, tensors: Mapping[str, Tensor], *, config: TrainConfig[Any], task: Task[Any]
) -> None:
    """Write a model folder without the files for resuming.

    Raises:
        UserError: The folder exists.
    """
    check_new_folder(folder, name="output")
    with new_folder(folder) as temporary:
        write_model(temporary, tensors, config=config, task=task)


def write_model(
    folder: Path, tensors: Mapping[str, Tensor], *, config: TrainConfig[Any], task: Task[Any]
) -> None:
    """Write a model into an existing folder."""
    task.save_assets(folder)
    write_model_config(config, folder)
    save_tensors(tensors, folder / MODEL_NAME)


class _LargerModelError(Exception):
    """A model has more parameters than the number of weights in the file allows."""


@contextmanager
def _at_most(num_parameters: int) -> Iterator[None]:
    """Raise `_LargerModelError` as soon as the modules that this thread makes have more parameters."""
    thread, count = threading.get_ident(), 0

    def note(*_: object) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > num_parameters:
                raise _LargerModelError

    hook = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        hook.remove()


def _check_shapes(expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise `UserError` unless a file holds exactly these weights; only its header is read."""
    found = read_header(path)
    for name, tensor in expected.items():
        if name not in found:
            raise UserError(f"`{path}` must hold the weights of the model, but has no `{name}`.")
        kind, shape = found.pop(name)
        if shape != tuple(tensor.shape):
            raise UserError(
                f"`{name}` in `{path}` must be of shape {tuple(tensor.shape)} for this model and its "
                f"vocabulary, but is {shown(shape)}."
            )
        if kind.startswith(("F", "BF")) != tensor.is_floating_point() or kind not in _KINDS:
            raise DamagedError(f"`{name}` in `{path}` must be of {tensor.dtype}, but is of {shown(kind)}.")
    if found:
        raise UserError(
            f"`{path}` must hold the weights of the model alone, but has `{next(iter(found))}` too."
        )
