"""Run a function on several ranks: real processes over Gloo, one thread each."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from nmt.distributed import World, join_world


def run_ranks(function: Callable[..., None], *args: Any, size: int) -> None:
    """Call `function(world, *args)` on `size` ranks; an error of one is raised here."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    mp.spawn(_run_rank, args=(function, args, size, port), nprocs=size)


def _run_rank(rank: int, function: Callable[..., None], args: tuple[Any, ...], size: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with join_world("cpu") as world:
        assert isinstance(world, World)
        function(world, *args)
