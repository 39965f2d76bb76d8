"""Checkpoints: immutable folders, written once under a temporary name and renamed when complete.

    checkpoints/update-0012000/   model.safetensors, config.yaml, the task's assets: a model, ready to use
                                  optimizer.safetensors, state.json: what resuming needs besides
    checkpoints/best, last        relative symbolic links, swapped atomically

A folder is complete if its final name exists. Nothing in it is a pickle.
"""

import errno
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nmt.config import from_mapping, read_yaml, write_yaml
from nmt.errors import UserError
from nmt.model_folders import MODEL_NAME, find_model, follow_link, write_link
from nmt.new_folder import new_folder, remove_folder, remove_leftovers, sync
from nmt.old_checkpoints import upgrade_state
from nmt.options import TrainConfig
from nmt.task import Task, load_task
from nmt.weights import weights

FORMAT_VERSION = "2"
_READABLE_VERSIONS = ("1", FORMAT_VERSION)

_MODEL, _CONFIG = MODEL_NAME, "config.yaml"
_OPTIMIZER, _STATE = "optimizer.safetensors", "state.json"


class CheckpointFolder:
    """The `checkpoints` folder of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def updates(self) -> list[int]:
        """Return the updates of the complete checkpoints, oldest first."""
        names = (child.name for child in self.path.glob("update-*") if child.is_dir())
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"update-(\d+)", name)))

    def at(self, update: int) -> Path:
        """Return the folder of the checkpoint after `update` updates."""
        return self.path / f"update-{update:07d}"

    def save(
        self,
        update: int,
        *,
        model: nn.Module,
        task: Task[Any],
        config: TrainConfig[Any],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint and let `last` point at it; one of the same update that exists is kept.

        Raises:
            UserError: It could not be written; those that are there stay as they are.
        """
        final = self.at(update)
        try:
            if not final.exists():
                with new_folder(final) as temporary:
                    _save_tensors(optimizer, temporary / _OPTIMIZER)
                    (temporary / _STATE).write_text(
                        json.dumps({"version": int(FORMAT_VERSION), **state}, indent=1), encoding="utf-8"
                    )
                    _write_model(temporary, weights(model), config=config, task=task)
            self.link("last", update)
        except OSError as error:
            there = self.updates()
            kept = f"the checkpoint of update {there[-1]}" if there else "the beginning"
            raise UserError(
                f"`{final}` could not be written: {error.strerror}. Earlier checkpoints are as they were: "
                f"make room, and the same command goes on from {kept}."
            ) from error
        return final

    def link(self, name: str, update: int) -> None:
        """Point `best` or `last` at a checkpoint, atomically."""
        write_link(self.path / name, self.at(update).name)
        sync(self.path)

    def linked(self, name: str) -> Path:
        """Return where `best` or `last` is, for whoever is to open it."""
        return follow_link(self.path / name)

    def prune(self, keep: Iterable[int]) -> None:
        """Remove the checkpoints of all other updates, and what a killed process left unfinished."""
        kept = set(keep)
        for update in self.updates():
            if update not in kept:
                remove_folder(self.at(update))
        remove_leftovers(self.path, of="update-*")

    def load_state(self, update: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the optimizer's tensors and the state of the run."""
        folder = self.at(update)
        optimizer = _load_tensors(folder / _OPTIMIZER)
        try:
            state: dict[str, Any] = json.loads(_existing(folder / _STATE).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(
                f"`{folder / _STATE}` must be complete JSON, but is cut short or damaged."
            ) from error
        return optimizer, upgrade_state(state, num_optimizer_tensors=len(optimizer))


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights of a model folder into a model, which must have the same names and shapes."""
    path = folder / _MODEL
    loaded = _load_tensors(path)
    for name, tensor in weights(model).items():
        if name not in loaded:
            raise UserError(f"`{path}` must hold the weights of the model, but has no `{name}`.")
        if loaded[name].shape != tensor.shape:
            raise UserError(
                f"`{name}` in `{path}` must be of shape {tuple(tensor.shape)} for this model and its "
                f"vocabulary, but is {tuple(loaded[name].shape)}."
            )
        tensor.copy_(loaded.pop(name))
    if loaded:
        raise UserError(
            f"`{path}` must hold the weights of the model alone, but has `{next(iter(loaded))}` too."
        )


def load_config(folder: Path) -> TrainConfig[Any]:
    """Return the configuration that a model folder was trained with.

    Raises:
        UserError: The folder lacks a file or has another format version.
    """
    _read_version(folder / _MODEL)  # first: a newer release's options may not be known here
    mapping = read_yaml(_existing(folder / _CONFIG))
    options_type = load_task(mapping.get("task", "translation"))
    return from_mapping(TrainConfig[options_type], mapping, where=str(folder / _CONFIG))  # type: ignore[valid-type]


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, Task[Any]]:
    """Return the model of a model folder, or of a run's best checkpoint, in evaluation mode, and its task.

    Raises:
        UserError: The folder lacks a file, is cut short, has another format version, or does not fit together.
    """
    folder = find_model(folder).folder
    task: Task[Any] = load_config(folder).task_options.build(folder)
    model = task.build_model()
    load_weights(model, folder)
    return model.to(device).eval(), task


def average_models(folders: Sequence[Path], output: Path) -> None:
    """Write a model folder whose weights are the mean of others', formed in float64.

    Integers (batch norm's counters) are taken from the last folder.
    """
    config = load_config(folders[-1])
    task: Task[Any] = config.task_options.build(folders[-1])
    model = task.build_model()
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
    """Write a model folder without anything to resume from.

    Raises:
        UserError: The folder exists.
    """
    if folder.exists():
        raise UserError(f"`{folder}` must not exist yet. Remove it or name another folder.")
    with new_folder(folder) as temporary:
        _write_model(temporary, tensors, config=config, task=task)


def _write_model(
    folder: Path, tensors: Mapping[str, Tensor], *, config: TrainConfig[Any], task: Task[Any]
) -> None:
    task.save_assets(folder)
    write_yaml(config, folder / _CONFIG)
    _save_tensors(tensors, folder / _MODEL)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": f"nmt {FORMAT_VERSION}"})
        path.chmod(path.parent.stat().st_mode & 0o666)  # it lets nobody else read, whatever the umask
    except SafetensorError as error:  # it gives the number of the system's error in its text alone
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(path)) from error


def _load_tensors(path: Path) -> dict[str, Tensor]:
    _read_version(path)
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _read_version(path: Path) -> None:
    """Raise `UserError` if a file is not there or not whole, or if its format version cannot be read."""
    _existing(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, RuntimeError) as error:
        raise _damaged(path, error) from error
    _check_version(metadata, path)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"`{path}` must be a complete safetensors file, but is cut short or damaged: {error}.")


def _check_version(metadata: Mapping[str, str], path: Path) -> None:
    """Raise `UserError` if a file has another format version than this release reads, and say what to do."""
    name, _, version = metadata.get("format", "").partition(" ")
    # One entry, since safetensors writes several in an order that changes from run to run. There have been two.
    version = version or metadata.get("format_version", "")
    if name != "nmt":
        raise UserError(
            f"`{path}` must be of format version {FORMAT_VERSION}, but is of none: "
            "nmt-toolkit did not write it. Name a model folder of nmt-train or nmt-convert."
        )
    if version in _READABLE_VERSIONS:
        return
    is_newer = version.isdecimal() and int(version) > int(FORMAT_VERSION)
    what_to_do = (
        "A newer release of nmt-toolkit wrote it: install that one."
        if is_newer
        else "An older release of nmt-toolkit wrote it: use that one, "
        "or train again with this one on the same data."
    )
    raise UserError(
        f"`{path}` must be of format version {FORMAT_VERSION}, but is of {version or 'none'}. {what_to_do}"
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"`{path}` must be a file of the checkpoint, but is missing.")
    return path
