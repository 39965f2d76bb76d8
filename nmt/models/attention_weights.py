"""What each target position looks at in the source: attention weights, computed outside the search.

Shapes: B sentences, S source length, T target length, D model, H heads, E head size.
"""

import torch
from torch import Tensor

from nmt.models.attention import CrossAttention, split_heads
from nmt.models.transformer import Transformer


@torch.inference_mode()
def cross_attention_weights(
    model: Transformer, source: Tensor, target_input: Tensor, *, layer: int
) -> Tensor:
    """Run sources and given targets through a model, and return what a decoder layer attends to.

    Args:
        model: In evaluation mode.
        source: (B, S) int64, each sentence ending in eos and padded on the right.
        target_input: (B, T) int64, the target shifted right and begun with eos.
        layer: Of the decoder, from 0; negative numbers count from the last one.

    Returns:
        (B, T, S) float32, the mean over the heads; each row sums to 1, and padding of the source has 0.
    """
    attention = model.decoder.layers[layer].cross_attention
    assert isinstance(attention, CrossAttention)
    inputs: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        memory = model.encode(source)
        model.features(target_input, memory)
    finally:
        handle.remove()
    (queries,) = split_heads(attention.q_proj(inputs[0]), 1, attention.num_heads)  # (B, T, D) -> (B, H, T, E)
    scores = queries @ memory.keys[layer].transpose(2, 3) / queries.size(-1) ** 0.5  # (B, H, T, S)
    scores = scores.float().masked_fill(memory.padding_mask[:, None, None, :], -torch.inf)
    return scores.softmax(dim=-1).mean(dim=1)
