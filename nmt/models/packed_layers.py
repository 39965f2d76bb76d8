"""The layers of the Transformer for packed rows on a GPU: everything except the products in our own kernels.

PyTorch reads and writes the rows once for each of dropout, residual connection, normalisation and ReLU, and for
each sum over them in the backward pass. Here a residual connection is one kernel in each direction
(`norm_kernels.py`), and so is the gradient of a bias (`linear_kernels.py`). The result is that of the modules
(`blocks.py`, `attention.py`), whose weights are read. A layer with any unknown part runs as it is.

Two tensors go from one sublayer to the next: `read`, the input of the block, and `past`, which goes past the block
to the sum. The last product of a block leaves its bias to the next kernel, which reads the rows anyway.

    post-norm   read --> block ----> add_and_norm --> read, past (the same y twice)
                past -----------------^

    pre-norm    past --> norm_beside --> read --> block --> add --> past
                              +--> past ---------------------^

Shapes: N, M tokens of a row, D model.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmt.models.attention import CrossAttention, SelfAttention
from nmt.models.blocks import FeedForward, Residual
from nmt.models.packed import Spans, attend_to_other, attend_to_self
from nmt.models.training_ops import DROPOUTS, LINEARS
from nmt.system.slower import works

if TYPE_CHECKING:
    from nmt.models.norm_kernels import Product

Block = Callable[[Tensor], "Product"]
"""(N, D) -> (N, D), with the bias of its last product not yet added."""
Sublayer = tuple[Residual, Block]
"""A block within its residual connection."""

_PARTS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    SelfAttention: LINEARS,
    CrossAttention: LINEARS,
    FeedForward: (*LINEARS, *DROPOUTS),
    Residual: (nn.LayerNorm, *DROPOUTS),
}
_RELU = F.relu
_WIDEST = 4096  # of D, because a program of a kernel holds whole rows


def can_run(layer: nn.Module, x: Tensor, spans: Spans) -> bool:
    """Return whether all parts of a layer are known here, and our kernels work for its input (1, N, D).

    Under torch.compile they are not used: it makes its own kernels from the modules.
    """
    if not spans.has_layer_kernels or torch.compiler.is_compiling():
        return False
    return all(
        type(part) in _PARTS
        and _is_plain(part, x.dtype)
        and all(type(child) in _PARTS[type(part)] and _is_plain(child, x.dtype) for child in part.children())
        for part in layer.children()
    )


def can_run_all(layers: nn.ModuleList, kind: type[nn.Module], x: Tensor, spans: Spans) -> bool:
    """Return whether all layers of a stack can run together: each is exactly of this class, and unchanged."""
    return all(
        type(layer) is kind and _is_plain(layer, x.dtype) and can_run(layer, x, spans) for layer in layers
    )


def _is_plain(module: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether a module computes just what its class and its weights say, and all weights have this type."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    if any(hooks) or module._backward_pre_hooks or "forward" in vars(module):
        return False
    if not all(_is_as_written(type(module), name) for name in ("forward", "attend_packed")):
        return False
    weights = module._parameters.values()
    return all(w is not None and type(w) in (nn.Parameter, Tensor) and w.dtype == dtype for w in weights)


def _is_as_written(cls: type[nn.Module], name: str) -> bool:
    """Return whether nobody has replaced a method; True if the class has no such method."""
    method = getattr(cls, name, None)
    return method is None or (method.__module__ == cls.__module__ and not hasattr(method, "__wrapped__"))


@cache
def have_kernels(dtype: torch.dtype, width: int, device: torch.device) -> bool:
    """Return whether layers of this width run here: in half precision on a GPU, where Triton works.

    The first call tries the kernels out. If they fail, a warning says why.
    """
    is_half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not is_half or width > _WIDEST:
        return False

    def try_out() -> None:
        _linear_kernels().try_out(dtype, device)
        _norm_kernels().try_out(dtype, width, device)
        torch.cuda.synchronize(device)

    return works("Triton's kernel of layers", try_out)


def _linear_kernels() -> ModuleType:
    from nmt.models import linear_kernels  # here, because only PyTorch's builds for GPUs come with Triton

    return linear_kernels


def _norm_kernels() -> ModuleType:
    from nmt.models import norm_kernels

    return norm_kernels


def run(x: Tensor, layers: Sequence[Sequence[Sublayer]]) -> Tensor:
    """Compute one layer, or several one after another.

    Args:
        x: (1, N, D).
        layers: The sublayers of each, with blocks from `self_attention`, `cross_attention` and `feed_forward`.

    Returns:
        (1, N, D).
    """
    kernels = _norm_kernels()
    # What a block reads, and what goes past it. Often the same tensor, but each has its own gradient.
    read = past = x.flatten(0, 1)
    for sublayers in layers:
        drops = [_probability(around.dropout) for around, _ in sublayers]
        # Two numbers for each seed, of which one is read. So each begins at a multiple of 16 bytes; for other
        # addresses Triton would compile a kernel again. Without dropout no seed is read.
        seeds = torch.empty(len(drops), 2, dtype=torch.int64, device=x.device)
        if any(drops):
            seeds.random_(2**62)
        for (around, block), drop in zip(sublayers, map(kernels.Drop, drops, seeds.unbind()), strict=True):
            norm = kernels.Norm(around.norm.weight, around.norm.bias, around.norm.eps)
            if around.pre_norm:
                read, past = kernels.norm_beside(past, norm)
                read = past = kernels.add(past, block(read), drop)
            else:
                read, past = kernels.add_and_norm(past, block(read), norm, drop)
    return past[None]


def self_attention(attention: SelfAttention, spans: Spans) -> Block:
    """Return the block by which each part of a row attends to itself."""

    def block(x: Tensor) -> "Product":
        projected = _linear(attention.qkv_proj, x)
        dropout = attention.dropout if attention.training else 0.0
        attended = attend_to_self(projected[None], spans, num_heads=attention.num_heads, dropout=dropout)
        return _product(attention.out_proj, attended.flatten(0, 1))

    return block


def cross_attention(attention: CrossAttention, memory: Tensor, spans: Spans) -> Block:
    """Return the block by which each part of a row attends to its part of `memory` (1, M, memory_dim)."""

    def block(x: Tensor) -> "Product":
        query, projected = _linear(attention.q_proj, x), _linear(attention.kv_proj, memory.flatten(0, 1))
        dropout = attention.dropout if attention.training else 0.0
        attended = attend_to_other(
            query[None], projected[None], spans, num_heads=attention.num_heads, dropout=dropout
        )
        return _product(attention.out_proj, attended.flatten(0, 1))

    return block


def feed_forward(module: FeedForward) -> Block:
    """Return the block of two linear layers with an activation between them."""
    has_relu = module.activation is _RELU

    def block(x: Tensor) -> "Product":
        hidden = _linear(module.expand, x, has_relu=has_relu)
        hidden = module.dropout(hidden if has_relu else module.activation(hidden))
        return _product(module.contract, hidden)

    return block


def _probability(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _linear(layer: nn.Linear, x: Tensor, *, has_relu: bool = False) -> Tensor:
    result: Tensor = _linear_kernels().linear(x, layer.weight, layer.bias, has_relu=has_relu)
    return result


def _product(layer: nn.Linear, x: Tensor) -> "Product":
    product: Product = _norm_kernels().Product(F.linear(x, layer.weight), layer.bias)
    return product
