"""Checkpoints: immutable folders, written once under a temporary name and renamed when complete.

    checkpoints/update-0012000/   model.safetensors, config.yaml, the task's assets: a model, ready to use
                                  validation.json: what was measured of it, if it was validated
                                  optimizer.safetensors, state.json: what resuming needs besides
    checkpoints/best, last        relative symbolic links, swapped atomically

A folder is complete if its final name exists. Nothing in it is a pickle.
"""

import errno
import json
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nmt.checkpoints.find_folder import MODEL_NAME, find_model, follow_link, write_link
from nmt.checkpoints.model_config import CONFIG_NAME, load_model_config, write_model_config
from nmt.checkpoints.old_formats import upgrade_state
from nmt.checkpoints.run_state import ANY_VERSION, FIRST_VERSION, RUN_STATE
from nmt.checkpoints.weights import weights
from nmt.config.records import check_record, read_record
from nmt.errors import DamagedError, UserError, shown
from nmt.options import TrainConfig
from nmt.system.new_folder import new_folder, remove_folder, remove_leftovers, sync
from nmt.system.places import check_new_folder
from nmt.task import Task

FORMAT_VERSION = "2"
_READABLE_VERSIONS = ("1", FORMAT_VERSION)

_TAKE_ANOTHER = "Restore it, or take another checkpoint."
_KINDS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")  # safetensors' names

_MOST_NAMES_A_WEIGHT = 4  # a model may be made of parts that share parameters, or are thrown away

_MODEL, _OPTIMIZER, _STATE = MODEL_NAME, "optimizer.safetensors", "state.json"
MEASURED = "validation.json"
"""What has been measured of a folder's model on the validation set: a copy of it knows how good it is."""


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
        measured: Mapping[str, float] | None = None,
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint and let `last` point at it; one of the same update that exists is kept.

        Args:
            update: The number of updates that have been made.
            model: Its weights are saved.
            task: Has the assets.
            config: Of the run.
            measured: What has been measured of the model, if it was validated. One that is kept gets this too.
            optimizer: Its tensors.
            state: Of the run.

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
                    _write_measured(temporary, update, measured)
            elif not (final / MEASURED).exists():
                _write_measured(final, update, measured)
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
        """Return the optimizer's tensors and the state of the run.

        Raises:
            DamagedError: They are not as they were written.
        """
        folder = self.at(update)
        optimizer = load_tensors(folder / _OPTIMIZER)
        path = _existing(folder / _STATE)
        state = read_record(path, ANY_VERSION, what_to_do=_TAKE_ANOTHER)
        if state.get("version", 1) == 1:
            state = read_record(path, FIRST_VERSION, what_to_do=_TAKE_ANOTHER)
        state = upgrade_state(state, num_optimizer_tensors=len(optimizer))
        return optimizer, check_record(RUN_STATE, state, where=str(path), error=DamagedError)

    @contextmanager
    def offering_an_earlier(self, update: int) -> Iterator[None]:
        """If the checkpoint of an update proves damaged within the block, name the one before it that is whole.

        Raises:
            DamagedError: It has.
        """
        try:
            yield
        except DamagedError as error:
            bad = [update]
            for earlier in reversed([saved for saved in self.updates() if saved < update]):
                if self._is_whole(earlier):
                    doomed = " and ".join(f"`{self.at(number)}`" for number in bad)
                    raise DamagedError(
                        f"{error} The checkpoint of update {earlier} is whole: remove {doomed}, and the same "
                        "command goes on from there."
                    ) from error
                bad.append(earlier)
            raise

    def _is_whole(self, update: int) -> bool:
        try:
            self.load_state(update)
            load_config(self.at(update))
            load_tensors(self.at(update) / _MODEL)
        except (UserError, OSError):
            return False
        return True


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights of a model folder into a model, which must have the same names and shapes.

    Raises:
        UserError: It has not, or the file is missing or damaged. The model is as it was then.
    """
    path = folder / _MODEL
    expected = weights(model)
    _check_shapes(expected, path)
    loaded = load_tensors(path)
    for name, tensor in expected.items():
        tensor.copy_(loaded[name])


def build_model(task: Task[Any], folder: Path) -> nn.Module:
    """Make the model of a task with the weights of a model folder.

    Raises:
        UserError: They do not fit together. It is found out before memory is taken for the model, since a damaged
            configuration can ask for one of any size.
    """
    num_weights = len(_read_header(folder / _MODEL))
    try:
        with torch.device("meta"), _at_most(_MOST_NAMES_A_WEIGHT * num_weights):
            sizes = weights(task.build_model())
    except _LargerModelError:
        raise UserError(
            f"`{folder / _MODEL}` must hold the weights of the model that {folder / CONFIG_NAME} describes, but "
            f"holds {num_weights:,} and the model has more."
        ) from None
    except Exception:  # some models compute while they are made, which tensors without content cannot
        pass
    else:
        _check_shapes(sizes, folder / _MODEL)
    model = task.build_model()
    load_weights(model, folder)
    return model


class _LargerModelError(Exception):
    """A model has more parameters than it can have."""


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
    """Raise `UserError` unless a file holds just these weights, by its header alone."""
    found = _read_header(path)
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


def load_config(folder: Path) -> TrainConfig[Any]:
    """Return the configuration that a model folder was trained with.

    Raises:
        UserError: The folder lacks a file or has another format version.
    """
    _read_header(folder / _MODEL)  # first: a newer release's options may not be known here
    return load_model_config(folder)


def load_model(folder: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, Task[Any]]:
    """Return the model of a model folder, or of a run's best checkpoint, in evaluation mode, and its task.

    Raises:
        UserError: The folder lacks a file, is cut short, has another format version, or does not fit together.
    """
    folder = find_model(Path(folder)).folder
    task: Task[Any] = load_config(folder).task_options.build(folder)
    return build_model(task, folder).to(device).eval(), task


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
    """Write a model folder without anything to resume from.

    Raises:
        UserError: The folder exists.
    """
    check_new_folder(folder, name="output")
    with new_folder(folder) as temporary:
        _write_model(temporary, tensors, config=config, task=task)


def _write_model(
    folder: Path, tensors: Mapping[str, Tensor], *, config: TrainConfig[Any], task: Task[Any]
) -> None:
    task.save_assets(folder)
    write_model_config(config, folder)
    _save_tensors(tensors, folder / _MODEL)


def _write_measured(folder: Path, update: int, measured: Mapping[str, float] | None) -> None:
    """Write all that a validation has measured, under its name at once."""
    if measured is None:
        return
    numbers = {name: value if math.isfinite(value) else None for name, value in measured.items()}
    temporary = folder / f".{MEASURED}.tmp"
    temporary.write_text(
        json.dumps({"update": update, "metrics": numbers}, indent=1) + "\n", encoding="utf-8"
    )
    temporary.replace(folder / MEASURED)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": f"nmt {FORMAT_VERSION}"})
        path.chmod(path.parent.stat().st_mode & 0o666)  # it lets nobody else read, whatever the umask
    except SafetensorError as error:  # it gives the number of the system's error in its text alone
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(path)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Raises:
        UserError: It is missing, damaged, or of another format version.
    """
    _read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, error) from error


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the type and the shape of each tensor in a file, without reading them.

    Raises:
        UserError: It is missing, not whole, or of a format version that cannot be read.
    """
    _existing(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            header = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, error) from error
    _check_version(metadata, path)
    return header


def _damaged(path: Path, error: Exception) -> DamagedError:
    return DamagedError(
        f"`{path}` must be a complete safetensors file, but is cut short or damaged: {error}."
    )


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
        raise DamagedError(f"`{path}` must be a file of the checkpoint, but is missing.")
    return path
