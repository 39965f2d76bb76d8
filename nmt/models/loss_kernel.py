"""The cross-entropy of a chunk of logits and its gradient, in place, as a Triton kernel for GPUs of two passes.

Shapes: N tokens, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS_AT_ONCE = 4096


@triton.jit
def _softmax_gradient(
    z, targets, log_normalizers, target_logits, stride, num_columns, extra, ignored, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    start = z + row.to(tl.int64) * stride
    target = tl.load(targets + row)
    highest = -float("inf")
    total = 0.0
    for first in range(0, num_columns, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(start + at, mask=at < num_columns, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    log_normalizer = highest + tl.log(total)
    tl.store(log_normalizers + row, log_normalizer)
    tl.store(target_logits + row, tl.load(start + target).to(tl.float32))
    counts = (target != ignored).to(tl.float32)
    for first in range(0, num_columns, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(start + at, mask=at < num_columns, other=-float("inf")).to(tl.float32)
        grad = tl.exp(x - log_normalizer) - tl.where(at == target, extra, 0.0)
        tl.store(start + at, (grad * counts).to(z.dtype.element_ty), mask=at < num_columns)


def softmax_gradient_(
    z: Tensor, target: Tensor, *, extra: float, ignored: int | None
) -> tuple[Tensor, Tensor]:
    """Replace logits by softmax(z) minus `extra` at the target; by zeros in rows whose target is `ignored`.

    Args:
        z: (N, V) float of any width, rows side by side.
        target: (N,) int64.
        extra: By how much the target's probability is above that of the others in the smoothed distribution.
        ignored: A target that does not count, or None.

    Returns:
        For each row the logarithm of its normaliser, and the logit of its target: (N,) float32 each.
    """
    assert z.stride(1) == 1
    log_normalizers = torch.empty(z.size(0), dtype=torch.float32, device=z.device)
    target_logits = torch.empty_like(log_normalizers)
    block = min(_COLUMNS_AT_ONCE, triton.next_power_of_2(z.size(1)))
    launch: Any = _softmax_gradient[(z.size(0),)]
    launch(
        *(z, target, log_normalizers, target_logits, z.stride(0), z.size(1), extra),
        *(-1 if ignored is None else ignored, block),
        num_warps=8,
    )
    return log_normalizers, target_logits


def try_out(device: torch.device) -> None:
    """Run the kernel once; raise Triton's error if Triton or the C compiler does not work."""
    logits, target = torch.zeros(1, 16, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    softmax_gradient_(logits, target, extra=1.0, ignored=None)
    torch.cuda.synchronize(device)
