"""oneDNN's products on a CPU, by private operators of PyTorch. If PyTorch renames one, only this file changes.

PyTorch's own products in float32 are MKL's, which reach half of this rate on processors other than Intel's.

Shapes: M rows, K inputs, O outputs.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

_PACKED_FOR = 128  # rows; products of other numbers of rows use the same packing


def has_products() -> bool:
    """Return whether this build of PyTorch has oneDNN's products under the name used here."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops, "mkldnn")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def has_products_in(dtype: torch.dtype) -> bool:
    """Return whether there are products of this type, float32 or bfloat16, that are worth using."""
    if dtype == torch.bfloat16:
        return has_products() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and has_products()


@cache
def has_fast_float32() -> bool:
    """Return whether products of float32 use AVX-512. Those are at least as fast as MKL's."""
    return has_products() and "AVX512" in torch.backends.cpu.get_cpu_capability()


def has_integers() -> bool:
    """Return whether there are products of 8-bit integers, and of bfloat16 for the other maps."""
    return has_products_in(torch.bfloat16) and hasattr(torch.ops.onednn, "qlinear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., K) and (O, K), each of any strides, to x W^T + b."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def operator_of_products() -> Any:
    """Return the operator itself, for code that counts operators; None if there is none."""
    return torch.ops.mkldnn._linear_pointwise if has_products() else None


def packed_map(
    weight: Tensor, bias: Tensor | None, *, activation: str = "none"
) -> Callable[[Tensor], Tensor]:
    """Return the map x -> activation(x W^T + b) with weights (O, K) that are packed once.

    Args:
        weight: Of a type for which there are products.
        bias: (O,).
        activation: "none" or "relu".
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x: cast(Tensor, multiply(x, packed, bias, activation, [], ""))


def packed_integers(
    weight: Tensor,
    bias: Tensor | None,
    step: float,
    *,
    zero: int,
    scales: Tensor,
    dtype: torch.dtype,
    output_step: float,
    activation: str,
) -> Callable[[Tensor], Tensor]:
    """Return the map of uint8 inputs (M, K), counted in `step`s from `zero`, to their product with weights (O, K).

    Args:
        weight: int8, counted in `scales`; it is packed once.
        bias: (O,) float32.
        step: Of inputs.
        zero: What stands for 0 in inputs.
        scales: (O,) of weights.
        dtype: Of the result.
        output_step: Of the result, if that is of integers.
        activation: "none" or "relu".
    """
    packed = torch.ops.onednn.qlinear_prepack(weight, [_PACKED_FOR, weight.size(1)])
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    multiply = torch.ops.onednn.qlinear_pointwise.default
    return lambda x: cast(
        Tensor,
        multiply(x, step, zero, packed, scales, zeros, bias, output_step, 0, dtype, activation, [], ""),
    )
