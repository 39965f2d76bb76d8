"""The ranks of a run: what each one is, and how they add up and exchange values.

A run on one device is a world of size 1; nothing outside this file asks whether there is a process group.
"""

import gc
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

# Import this before any group exists: default arguments in this module keep the group of the time of import.
import torch.distributed.nn.functional
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from nmt.errors import LostRankError, UserError, shown
from nmt.system.cudnn_attention import leave_out_cudnn_attention
from nmt.system.device_time import DeviceTime, Moment
from nmt.system.lost_ranks import SignsOfLife, lost_rank_line

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

# A rank waits this long for another one: longer than rank 0 decodes a validation set or writes a large
# checkpoint while the others wait, short enough that a run whose rank died ends within the hour.
TIMEOUT = timedelta(minutes=30)

_STOPPED = "nmt/stopped"


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks of a run, and its device."""

    rank: int
    size: int
    device: torch.device
    store: Store | None = field(default=None, repr=False, compare=False)
    """The store through which the ranks have met. torchrun keeps it when it starts the ranks again."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and logs."""
        return self.rank == 0

    @property
    def sum_dtype(self) -> torch.dtype:
        """The type in which sums are kept."""
        return sum_dtype(self.device)

    @cached_property
    def waited(self) -> DeviceTime:
        """How long updates have waited for other ranks, exchange included."""
        return DeviceTime(self.device)

    def sum_in_update_(self, tensor: Tensor) -> Tensor:
        """Sum like `sum_`, and count the time as waiting."""
        if self.size == 1:
            return tensor
        with self.waited.counted():
            return self.sum_(tensor)

    def backward(self, loss: Tensor) -> None:
        """Run a backward pass that sums over ranks. The time after this rank's own part counts as waiting."""
        if self.size == 1:
            loss.backward()
            return
        ends: list[Moment] = []

        def note_end(_: Tensor) -> None:
            # This callback runs before the one that DDP queues later in the pass, which waits for the sums.
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: ends.append(self.waited.now()))

        loss.register_hook(note_end)
        loss.backward()
        self.waited.add_since(ends[0])

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

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0 on every rank; it is pickled."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def copy_from_main_(self, tensor: Tensor) -> None:
        """Replace a tensor on `device` by that of rank 0."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def mesh(self) -> "DeviceMesh":
        """Return the ranks in a row, as FSDP takes them; there are several."""
        from torch.distributed.device_mesh import DeviceMesh

        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, self.device.type)

    def own_rows(self, num_rows: int) -> slice:
        """Return which rows this rank keeps of a tensor that is dealt out. The last ranks may have fewer."""
        share = -(-num_rows // self.size)
        return slice(min(share * self.rank, num_rows), min(share * (self.rank + 1), num_rows))

    def join_rows(self, own: Tensor, num_rows: int) -> Tensor:
        """Join the rows of all ranks to a tensor of `num_rows` rows, on every rank: the opposite of `own_rows`."""
        share = -(-num_rows // self.size)
        padded = own.new_zeros(share, *own.shape[1:])
        padded[: own.size(0)] = own
        joined = own.new_empty(share * self.size, *own.shape[1:])
        dist.all_gather(list(joined.split(share)), padded)
        return joined[:num_rows]

    def note_stop(self) -> None:
        """Note in the store that the run was asked to stop, for ranks that torchrun starts again anyway."""
        if self.store is not None:
            self.store.set(_STOPPED, "")

    def was_stopped(self) -> bool:
        """Return whether the run was asked to stop before torchrun started these ranks."""
        return self.store is not None and self.store.check([_STOPPED])

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
def join_world(device: str, *, timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """Join the ranks that torchrun started, or be the only rank; leave them at the end.

    Args:
        device: "auto" (CUDA if there is one, else the CPU), "cpu", "cuda" or "mps" (an Apple GPU, for a single
            process; "auto" does not choose it, since nothing has been measured on one). With CUDA, rank r of a
            machine takes the r-th GPU.
        timeout: How long a rank waits for another one.

    Raises:
        LostRankError: Another rank has ended, or does not answer.
        UserError: for a device that is unknown or not there, or an environment that torchrun did not make.
    """
    size = _number_of_environment("WORLD_SIZE", 1)
    unset = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size > 1 and unset:
        raise UserError(
            f"`{unset[0]}` must be set where `WORLD_SIZE` is {size}, but is not. Start with torchrun."
        )
    rank = _number_of_environment("RANK", 0)
    chosen = _choose_device(device, size=size, local_rank=_number_of_environment("LOCAL_RANK", 0))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        leave_out_cudnn_attention()
    if size == 1:
        yield single(chosen)
        return
    try:
        store = next(rendezvous("env://", timeout=timeout))[0]
        signs = _join_group(store, rank=rank, size=size, device=chosen, timeout=timeout)
    except RuntimeError as failure:
        if not _is_of_connection(failure):
            raise
        raise LostRankError(_unreached_line(size, failure)) from failure
    signs.start()
    error: BaseException | None = None
    try:
        yield World(rank=rank, size=size, device=chosen, store=store)
    except BaseException as raised:
        error = raised
        if _is_of_connection(raised):
            raise LostRankError(lost_rank_line(signs.verdict())) from raised
        raise
    finally:
        if error is None or not _is_of_connection(error):
            signs.end(error)
            _leave(with_error=error is not None)


def _join_group(
    store: Store, *, rank: int, size: int, device: torch.device, timeout: timedelta
) -> SignsOfLife:
    """Make the process group when all ranks are here."""
    part = meet(store, rank=rank, size=size, timeout=timeout)
    signs = SignsOfLife(part, rank=rank, size=size, timeout=timeout.total_seconds())
    given: dict[str, Any] = {"store": part, "rank": rank, "world_size": size}
    if device.type == "cuda":
        # NCCL's own timeout ends the process with pages of output. The timeout of `signs` must come first.
        dist.init_process_group("nccl", **given, timeout=timeout + timedelta(minutes=1), device_id=device)
    else:
        dist.init_process_group("gloo", **given, timeout=timeout)
    return signs


def meet(store: Store, *, rank: int, size: int, timeout: timedelta = TIMEOUT) -> PrefixStore:
    """Wait for the other ranks. Return a part of the store that only the ranks of this start share.

    When torchrun starts ranks again, the store still holds what the lost ranks wrote, such as the addresses where
    they listened. That must not be used. So rank 0 proposes a list of the ranks that it sees. The list is good
    when each rank has found its own name on it, because no earlier process had that name.

    Raises:
        LostRankError: Some rank has not come in time.
    """
    mine = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    store.set(f"here {rank}", mine)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0 and store.check([f"here {other}" for other in range(size)]):
            store.set("list", "|".join(store.get(f"here {other}").decode() for other in range(size)))
        names = store.get("list").decode().split("|") if store.check(["list"]) else []
        if len(names) == size and names[rank] == mine:
            part = PrefixStore(blake2b("|".join(names).encode(), digest_size=8).hexdigest(), store)
            part.set(f"found {rank}", "")
            if rank == 0 and part.check([f"found {other}" for other in range(size)]):
                part.set("complete", "")
            if part.check(["complete"]):
                return part
        time.sleep(0.02)
    raise LostRankError(f"all {size} ranks must come within {timeout}, but some have not. Start all of them.")


def _unreached_line(size: int, failure: RuntimeError) -> str:
    line = f"all {size} ranks must reach each other, but could not: {str(failure).splitlines()[0]}"
    if _number_of_environment("LOCAL_WORLD_SIZE", size) == size:
        return line
    return (
        f"{line}. Set GLOO_SOCKET_IFNAME (for GPUs NCCL_SOCKET_IFNAME) to the network between the machines, such "
        "as eth0: the name of a machine may stand for another one, or for 127.0.1.1."
    )


def _is_of_connection(error: BaseException) -> bool:
    """Return whether an exchange between ranks failed. Gloo has no exception type of its own."""
    is_named = isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "Connection closed by peer", "Connection reset by peer")
    )
    return isinstance(error, dist.DistError) or is_named


def _leave(*, with_error: bool) -> None:
    """Leave the process group, and let its threads end.

    If a Gloo thread still waits for Python's lock when the interpreter ends, it aborts the process. The threads
    end with the group, and the group lives as long as something refers to it. DDP does, but the caller has
    dropped DDP.
    """
    gc.collect()
    dist.destroy_process_group()
    if with_error:
        # The exception's frames may refer to the group. While this thread sleeps, Gloo's threads get the lock.
        time.sleep(0.1)


def _choose_device(name: str, *, size: int, local_rank: int) -> torch.device:
    known = ("auto", "cpu", "cuda", "mps")
    if name not in known:
        raise UserError(f"`device` must be one of {', '.join(known)}, but is {shown(name)}.")
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


def _number_of_environment(name: str, default: int) -> int:
    """Return a variable that torchrun sets."""
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit():
        raise UserError(
            f"The variable `{name}` must be a whole number, but is {text!r}. Start with torchrun, or unset it."
        )
    return int(text)
