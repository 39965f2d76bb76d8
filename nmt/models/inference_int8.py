"""Products of 8-bit integers on a CPU, with ranges of rounding that come from the weights.

After layer normalisation a number is g*n + b. Here g and b are the weights of its place, and n has mean 0 and
variance 1 over a row. So the range for rounding is known before any sentence is seen. Nothing is calibrated, no
step looks for its largest number, and the result of a row depends neither on the other rows nor on their number.
Each place has its own range, and so have the weights of each output. Sums of integers are exact.

Rounding follows Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference"; their ranges are learnt.

Shapes: D inputs (places), O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from nmt.errors import UserError
from nmt.models.blocks import Embedding, FeedForward
from nmt.models.transformer import Decoder, DecoderLayer
from nmt.system import onednn

# Ranges in standard deviations; larger numbers are cut off. In two trained models the largest numbers were 3.3 to
# 6.4 standard deviations (of the widest place) after a normalisation, and 3.0 to 6.7 (of their own) before ReLU.
_DEVIATIONS = 6.0
_DEVIATIONS_BEFORE_RELU = 8.0
_LEAST_RANGE = 1e-6  # for numbers that are always 0, or, before ReLU, never above 0
_ZERO = 128  # stands for 0 in inputs, because processors multiply signed weights by unsigned inputs


@cache
def is_available() -> bool:
    """Return whether this machine multiplies 8-bit integers correctly, and bfloat16 for the other products.

    Without VNNI or something like it, sums of two products are cut off at 32,767.
    """
    if not onednn.has_integers():
        return False
    ones = torch.ones(16, 64)
    return bool((int8_map(ones, None, torch.ones(64))(ones) > 63).all())


def check_int8(device: torch.device) -> None:
    """Raise `UserError` if a device has no products of 8-bit integers."""
    if device.type != "cpu":
        raise UserError(
            f"`precision` int8 must be used on a CPU, but the device is {device}. Take bf16, or `--device cpu`."
        )
    if not is_available():
        raise UserError(
            "`precision` int8 must have a processor that multiplies 8-bit integers (VNNI) and bfloat16, but this "
            "one does not. Take fp32."
        )


class Inputs(NamedTuple):
    """The parts whose results are the inputs of a decoder layer's blocks.

    The first one is the input to queries, keys and values.
    """

    self_attention: nn.LayerNorm | Embedding
    cross_attention: nn.LayerNorm
    feed_forward: nn.LayerNorm


def decoder_inputs(decoder: Decoder) -> tuple[list[Inputs], nn.LayerNorm | Embedding]:
    """Return the `Inputs` of each layer, and the part whose result is the input of the output projection."""
    before: nn.LayerNorm | Embedding = decoder.embedding
    inputs = []
    for layer in decoder.layers:
        layer = cast(DecoderLayer, layer)
        residuals = (layer.around_self_attention, layer.around_cross_attention, layer.around_feed_forward)
        first, second, third = (residual.norm for residual in residuals)
        if layer.around_self_attention.pre_norm:
            inputs.append(Inputs(first, second, third))
        else:
            inputs.append(Inputs(before, first, second))
            before = third
    return inputs, decoder.final_norm if isinstance(decoder.final_norm, nn.LayerNorm) else before


def ranges(source: nn.LayerNorm | Embedding) -> Tensor:
    """Return the range of each place (D,): the largest number that is kept, after a normalisation or an embedding.

    Raises:
        UserError: The range cannot be read from this kind of normalisation.
    """
    norm = source.norm if isinstance(source, Embedding) else source
    if isinstance(norm, nn.LayerNorm):
        largest = _DEVIATIONS * norm.weight.detach().abs() + norm.bias.detach().abs()
    elif not isinstance(source, Embedding) or not isinstance(norm, nn.Identity):
        raise UserError(
            "`precision` int8 must know how large the numbers are that a product takes, which a LayerNorm tells, "
            f"but not a {type(norm).__name__}. Take fp32."
        )
    else:
        tokens, positions = (x.detach().abs().amax(dim=0) for x in (source.tokens.weight, source.positions))
        largest = source.scale * tokens + positions
    return largest.clamp(min=_LEAST_RANGE)


def int8_map(
    weight: Tensor, bias: Tensor | None, input_ranges: Tensor, *, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """Return the map x -> x W^T + b for weights (O, D).

    Args:
        weight: Multiplied by the ranges of the inputs, then rounded to 255 values for each output.
        bias: (O,); not rounded.
        input_ranges: (D,): inputs are rounded to multiples of 1/127 of these, and cut off beyond them.
        dtype: The type of the result, float32 or bfloat16.

    Returns:
        A function (..., D) float32 -> (..., O).
    """
    multiply = _multiplied_by(weight * input_ranges, bias, 1 / 127, zero=_ZERO, dtype=dtype)
    factors = (127 / input_ranges).float()
    return lambda x: multiply(_quantized(x, factors))


def int8_feed_forward(feed_forward: FeedForward, norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """Return the map of a feed-forward block with ReLU whose inputs come from a layer normalisation.

    Hidden numbers stay integers, in steps of 1/255 of their range. The range of a hidden number is its mean plus 8
    standard deviations, as if the normalised inputs were independent. The first weights are divided by these
    ranges, and the second ones are multiplied by them.

    Returns:
        A function (..., D) float32 -> (..., D) float32.
    """
    expand, contract = feed_forward.expand, feed_forward.contract
    weight, bias = expand.weight.detach(), expand.bias.detach()
    mean = weight @ norm.bias.detach() + bias
    deviation = (weight * norm.weight.detach()).norm(dim=1)
    hidden = (mean + _DEVIATIONS_BEFORE_RELU * deviation).clamp(min=_LEAST_RANGE)  # (O,)
    input_ranges = ranges(norm)
    factors = (127 / input_ranges).float()
    first = _multiplied_by(
        weight * input_ranges / hidden[:, None],
        bias / hidden,
        1 / 127,
        zero=_ZERO,
        dtype=torch.uint8,
        output_step=1 / 255,
        activation="relu",
    )
    second = _multiplied_by(
        contract.weight.detach() * hidden, contract.bias.detach(), 1 / 255, zero=0, dtype=torch.float32
    )
    return lambda x: second(first(_quantized(x, factors)))


def _quantized(x: Tensor, steps_per_unit: Tensor) -> Tensor:
    """Return numbers (..., D) as uint8: `_ZERO` plus the number of steps; each place has its own step size."""
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
    """Return the function that multiplies uint8 inputs, counted in steps from `zero`, by weights (O, D).

    The weights are rounded here.

    Raises:
        UserError: A weight is not finite. Integers could not show this later.
    """
    weight = weight.detach().float()
    bias = None if bias is None else bias.detach().float()
    if not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise UserError(
            "`precision` int8 must have finite weights, but this model has others. Take fp32 to look."
        )
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30)  # (O,)
    return onednn.packed_integers(
        (weight / scales[:, None]).round().to(torch.int8),
        bias,
        step,
        zero=zero,
        scales=scales,
        dtype=dtype,
        output_step=output_step,
        activation=activation,
    )
