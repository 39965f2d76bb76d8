"""Checkpoints: immutable folders, written once under a temporary name and renamed when complete.

    checkpoints/update-0012000/   model.safetensors, config.yaml, the task's assets: a model, ready to use
                                  validation.json: what was measured of it, if it was validated
                                  optimizer.safetensors, state.json: what resuming needs besides
    checkpoints/best, last        relative symbolic links, swapped atomically

A folder is complete if its final name exists. Nothing in it is a pickle.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from nmt.checkpoints.find_folder import MODEL_NAME, follow_link, write_link
from nmt.checkpoints.model_folder import load_config, write_model
from nmt.checkpoints.old_formats import upgrade_state
from nmt.checkpoints.run_state import ANY_VERSION, FIRST_VERSION, RUN_STATE
from nmt.checkpoints.tensor_file import FORMAT_VERSION, existing, load_tensors, save_tensors
from nmt.config.records import check_record, read_record
from nmt.errors import DamagedError, UserError
from nmt.options import TrainConfig
from nmt.system.new_folder import new_folder, remove_folder, remove_leftovers, sync
from nmt.task import Task

_TAKE_ANOTHER = "Restore it, or take another checkpoint."
_OPTIMIZER, _STATE = "optimizer.safetensors", "state.json"
MEASURED = "validation.json"
"""The file of what was measured of a folder's model on the validation set, so that a copy tells how good it is."""


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
        weights: Mapping[str, Tensor],
        task: Task[Any],
        config: TrainConfig[Any],
        measured: Mapping[str, float] | None = None,
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint and let `last` point at it; one of the same update that exists is kept.

        Args:
            update: The number of updates that have been made.
            weights: Of the model.
            task: Has the assets.
            config: Of the run.
            measured: What was measured of the model, if it was validated. A checkpoint that exists gets it, too.
            optimizer: The optimizer's tensors; whole, like the weights, even if each rank keeps a part.
            state: Of the run.

        Raises:
            UserError: It could not be written. The other checkpoints stay as they are.
        """
        final = self.at(update)
        try:
            if not final.exists():
                with new_folder(final) as temporary:
                    save_tensors(optimizer, temporary / _OPTIMIZER)
                    (temporary / _STATE).write_text(
                        json.dumps({"version": int(FORMAT_VERSION), **state}, indent=1), encoding="utf-8"
                    )
                    write_model(temporary, weights, config=config, task=task)
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
        """Return the folder that `best` or `last` points at."""
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
            DamagedError: They are damaged.
        """
        folder = self.at(update)
        optimizer = load_tensors(folder / _OPTIMIZER)
        path = existing(folder / _STATE)
        state = read_record(path, ANY_VERSION, what_to_do=_TAKE_ANOTHER)
        if state.get("version", 1) == 1:
            state = read_record(path, FIRST_VERSION, what_to_do=_TAKE_ANOTHER)
        state = upgrade_state(state, num_optimizer_tensors=len(optimizer))
        return optimizer, check_record(RUN_STATE, state, where=str(path), error=DamagedError)

    @contextmanager
    def offering_an_earlier(self, update: int) -> Iterator[None]:
        """If the checkpoint of an update turns out damaged in the block, name the last earlier one that is whole.

        Raises:
            DamagedError: The checkpoint is damaged.
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
            load_tensors(self.at(update) / MODEL_NAME)
        except (UserError, OSError):
            return False
        return True


def _write_measured(folder: Path, update: int, measured: Mapping[str, float] | None) -> None:
    """Write what a validation has measured; the file gets its name when it is complete."""
    if measured is None:
        return
    numbers = {name: value if math.isfinite(value) else None for name, value in measured.items()}
    temporary = folder / f".{MEASURED}.tmp"
    temporary.write_text(
        json.dumps({"update": update, "metrics": numbers}, indent=1) + "\n", encoding="utf-8"
    )
    temporary.replace(folder / MEASURED)
