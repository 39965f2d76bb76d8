"""torch's deterministic algorithms, for as long as a run lasts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nmt.errors import UserError


@contextmanager
def deterministic_algorithms(is_wanted: bool) -> Iterator[None]:
    """Let every operation of torch in the block give the same bits for the same numbers, or fail.

    Enter the block before cuBLAS is first used, because cuBLAS reads its setting from the environment then.

    Raises:
        UserError: An operation has no deterministic form on this device.
    """
    if not is_wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "deterministic" not in text:
            raise
        operation = text.split(" does not have")[0] if " does not have" in text else text.split(". ")[0]
        raise UserError(
            f"`deterministic` must be off where an operation has no deterministic form, but {operation} has none "
            "here. Leave it out, or change the model or the device."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
