"""Whether the ranks of a run, which may be on several machines, were started for the same run."""

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nmt.config.mapping import to_mapping
from nmt.distributed import World
from nmt.errors import UserError, shown
from nmt.options import TrainConfig
from nmt.task import Examples
from nmt.task_extras import fingerprint_of

_MAY_DIFFER = ("num-workers",)
_SAME_COMMAND = "Start the same command on all machines"


def check_same_options(config: TrainConfig[Any], world: World) -> None:
    """Raise `UserError`, on all ranks, if options or torch differ between ranks; places may differ."""
    if world.size == 1:
        return
    mine = {**to_mapping(config, with_paths=False), "torch": torch.__version__}
    machines, options = _gather(mine, world)
    for rank, theirs in enumerate(options):
        for name in {**options[0], **theirs}:
            one, other = options[0].get(name), theirs.get(name)
            if one != other and name not in _MAY_DIFFER:
                raise UserError(
                    f"`{name}` must be the same on all ranks, but is {shown(one)} on rank 0 ({machines[0]}) and "
                    f"{shown(other)} on rank {rank} ({machines[rank]}). {_SAME_COMMAND}."
                )


def fingerprints(examples: Mapping[str, Examples[Any]], world: World) -> list[str]:
    """Return the fingerprint of each split; one rank of each machine reads the data for all.

    Raises:
        UserError: The machines have different examples; on all ranks.
    """
    machines, _ = _gather(None, world)
    is_reader = machines.index(machines[world.rank]) == world.rank
    prints = world.gather([fingerprint_of(split) for split in examples.values()] if is_reader else [])
    for rank, theirs in enumerate(prints):
        for name, one, other in zip(examples, prints[0], theirs or prints[0], strict=True):
            if one != other:
                raise UserError(
                    f"The {name} examples must be the same on all machines, but those on {machines[rank]} differ "
                    f"from those on {machines[0]}. Copy the data, or put them where all machines see them."
                )
    return prints[0]


def machines_without(folder: Path, world: World) -> list[str]:
    """Return the machines that do not see a folder."""
    machines, sees = _gather(folder.is_dir(), world)
    return sorted({machine for machine, is_seen in zip(machines, sees, strict=True) if not is_seen})


def check_seen_by_all(folder: Path, world: World) -> None:
    """Raise `UserError`, on all ranks, if a machine does not see a checkpoint, which every rank must read."""
    if missing := machines_without(folder, world):
        raise UserError(
            f"`{folder}` must be seen by all machines, since every rank reads it, but is not by "
            f"{', '.join(missing)}. Copy it to the same place there, or name a `save-dir` that they share."
        )


def _gather(value: Any, world: World) -> tuple[Sequence[str], Sequence[Any]]:
    """Return the machine of each rank, and its value."""
    machines, values = zip(*world.gather((socket.gethostname(), value)), strict=True)
    return machines, values
