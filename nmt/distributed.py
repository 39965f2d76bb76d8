"""The ranks of a run: what each one is, and how they add up and exchange values.

A run on one device is a world of size 1; nothing outside this file asks whether there is a process group.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nmt.errors import UserError

T = TypeVar("T")

# A rank waits this long for another one: longer than rank 0 decodes a validation set or writes a large
# checkpoint while the others wait, short enough that a run whose rank died ends within the hour.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks of a run, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and logs."""
        return self.rank == 0

    @property
    def sum_dtype(self) -> torch.dtype:
        """The type in which sums are kept."""
        return sum_dtype(self.device)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor on `device` by its sum over all ranks, and return it; its dtype stays."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of the ranks, on every rank; they are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T, *, source: int = 0) -> T:
        """Return the value of the rank `source` on every rank; it is pickled."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=source, device=self.device)
        return values[0]

    def copy_from_main_(self, tensor: Tensor) -> None:
        """Replace a tensor on `device` by that of rank 0."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            self.sum_(torch.zeros(1, device=self.device)).item()


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def single(device: torch.device) -> World:
    """Return a world of one rank."""
    return World(rank=0, size=1, device=device)


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the ranks that torchrun started, or be the only one, and leave them at the end.

    Args:
        device: "auto" (CUDA if there is one, else the CPU), "cpu", "cuda" or "mps" (an Apple GPU, for a single
            process; not chosen by itself, since nothing has been measured on one). With CUDA, rank r of a
            machine takes the r-th GPU.

    Raises:
        UserError: for a device that is unknown or not there, or an environment that torchrun did not make.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    unset = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size > 1 and unset:
        raise UserError(
            f"`{unset[0]}` must be set where `WORLD_SIZE` is {size}, but is not. Start with torchrun."
        )
    rank = int(os.environ.get("RANK", "0"))
    chosen = _choose_device(device, size=size, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield single(chosen)
        return
    if chosen.type == "cuda":
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=chosen)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield World(rank=rank, size=size, device=chosen)
    finally:
        dist.destroy_process_group()
        # DDP keeps Gloo's threads alive. One that is still waiting for Python's lock, to let its last tensor go,
        # would abort the process when the interpreter ends; while this thread sleeps, it gets the lock.
        time.sleep(0.1)


def _choose_device(name: str, *, size: int, local_rank: int) -> torch.device:
    known = ("auto", "cpu", "cuda", "mps")
    if name not in known:
        raise UserError(f"`device` must be one of {', '.join(known)}, but is {name!r}.")
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not has_mps or size > 1:
            fault = "there is none" if not has_mps else f"there are {size} processes, and MPS serves one"
            raise UserError(f"`device` mps must be an Apple GPU, but {fault}. Use `cpu`.")
        return torch.device("mps")
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise UserError(
            f"`device` cuda must have a GPU for each process of a machine, but process {local_rank + 1} "
            f"finds {num_gpus}. Start fewer processes, or use `cpu`."
        )
    return torch.device("cuda", local_rank)
