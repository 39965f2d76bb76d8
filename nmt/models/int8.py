"""Products of 8-bit integers on a CPU, of numbers whose range the weights tell.

Behind layer normalisation a number is g*n + b with the weights g and b of its place, where n has mean 0 and
variance 1 over a row. So the range in which it is rounded is known before any sentence is seen: nothing is
calibrated, no largest number is looked for at each step, and what becomes of a row depends neither on its
neighbours nor on their number. Weights have a scale for each output. Sums of integers are exact.

Rounding as in Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", where the ranges are learnt.

Shapes: D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from nmt.errors import UserError
from nmt.models.blocks import Embedding, FeedForward
from nmt.models.transformer import Decoder, DecoderLayer

# What lies beyond is cut off. Of two trained models the largest numbers behind each normalisation were 3.3 to 6.4
# standard deviations of its widest place, and 3.0 to 6.7 of their own before ReLU.
_DEVIATIONS = 6.0
_DEVIATIONS_BEFORE_RELU = 8.0
_ZERO = 128  # stands for 0 in inputs: processors multiply signed weights by unsigned inputs
_PACKED_FOR = 128  # rows; products of other numbers of rows use the same packing


def is_available() -> bool:
    """Return whether this machine multiplies 8-bit integers without rounding their sums to 16 bits.

    Processors without VNNI saturate the sum of two products at 32,767, and are hardly faster than with floats.
    """
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.onednn, "qlinear_pointwise")
        and torch.cpu._is_vnni_supported()
    )


def check_int8(device: torch.device) -> None:
    """Raise `UserError` if products of integers are not to be had on a device."""
    if device.type != "cpu":
        raise UserError(
            f"`precision` int8 must be used on a CPU, but the device is {device}. Take bf16, or `--device cpu`."
        )
    if not is_available():
        raise UserError(
            "`precision` int8 must have a processor that multiplies 8-bit integers (VNNI), but this one does not. "
            "Take bf16 or fp32."
        )


def norm_range(norm: nn.LayerNorm) -> float:
    """Return the largest size that is kept of what a layer normalisation returns."""
    return float((_DEVIATIONS * norm.weight.detach().abs() + norm.bias.detach().abs()).max())


def embedding_range(embedding: Embedding) -> float:
    """Return the largest size of what an embedding returns, or what is kept of it behind normalisation."""
    if isinstance(embedding.norm, nn.LayerNorm):
        return norm_range(embedding.norm)
    tokens, positions = embedding.tokens.weight.detach(), embedding.positions.detach()
    return float(embedding.scale * tokens.abs().max() + positions.abs().max())


def decoder_ranges(decoder: Decoder) -> list[float]:
    """Return the range of what each layer is given, if it is a post-norm one, and of the decoder's results."""
    ranges = [embedding_range(decoder.embedding)]
    ranges += [norm_range(cast(DecoderLayer, layer).around_feed_forward.norm) for layer in decoder.layers]
    if isinstance(decoder.final_norm, nn.LayerNorm):
        ranges[-1] = norm_range(decoder.final_norm)
    return ranges


def int8_map(
    weight: Tensor, bias: Tensor | None, input_range: float, *, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """Return the map x -> x W^T + b for weights (O, D).

    Args:
        weight: Rounded to 255 values for each output.
        bias: (O,); not rounded.
        input_range: Inputs are rounded to multiples of 1/127 of it, and cut off beyond it.
        dtype: Of the result, float32 or bfloat16.

    Returns:
        A function (..., D) float32 -> (..., O).
    """
    multiply = _multiplied_by(weight, bias, input_range / 127, zero=_ZERO, dtype=dtype)
    return lambda x: multiply(_quantized(x, 127 / input_range))


def int8_feed_forward(feed_forward: FeedForward, norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """Return the map of a feed-forward block with ReLU, for what a layer normalisation returns.

    Hidden numbers stay integers. Each has a range of its own, from its mean and standard deviation for inputs of
    which the normalised parts are independent; its inverse is part of the first weights and itself of the second.

    Returns:
        A function (..., D) float32 -> (..., D) float32.
    """
    expand, contract = feed_forward.expand, feed_forward.contract
    weight, bias = expand.weight.detach(), expand.bias.detach()
    mean = weight @ norm.bias.detach() + bias
    deviation = (weight * norm.weight.detach()).norm(dim=1)
    ranges = (mean + _DEVIATIONS_BEFORE_RELU * deviation).clamp(min=1e-6)  # (O,)
    step = norm_range(norm) / 127
    first = _multiplied_by(
        weight / ranges[:, None],
        bias / ranges,
        step,
        zero=_ZERO,
        dtype=torch.uint8,
        output_step=1 / 255,
        activation="relu",
    )
    second = _multiplied_by(
        contract.weight.detach() * ranges, contract.bias.detach(), 1 / 255, zero=0, dtype=torch.float32
    )
    return lambda x: second(first(_quantized(x, 1 / step)))


def _quantized(x: Tensor, steps_per_unit: float) -> Tensor:
    """Return numbers as uint8, counted in steps from `_ZERO`."""
    # There is no fast conversion to uint8, but one to int8; the first bit turns -128..127 into 0..255.
    steps = (x * steps_per_unit).round_().clamp_(-127, 127).to(torch.int8)
    return steps.bitwise_xor_(-128).view(torch.uint8)


def _multiplied_by(
    weight: Tensor,
    bias: Tensor | None,
    step: float,
    *,
    zero: int,
    dtype: torch.dtype,
    output_step: float = 1.0,
    activation: str = "none",
) -> Callable[[Tensor], Tensor]:
    """Return the product of uint8 inputs, counted in steps from zero, and weights (O, D) that are rounded here."""
    weight = weight.detach().float()
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30)  # (O,)
    packed = torch.ops.onednn.qlinear_prepack(
        (weight / scales[:, None]).round().to(torch.int8), [_PACKED_FOR, weight.size(1)]
    )
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    bias = None if bias is None else bias.detach().float()
    product = torch.ops.onednn.qlinear_pointwise.default
    return lambda x: cast(
        Tensor,
        product(x, step, zero, packed, scales, zeros, bias, output_step, 0, dtype, activation, [], ""),
    )
