"""Which parts of a Transformer are just what their classes say, so that their weights tell what they compute."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import Tensor, nn

from nmt.models.attention import CrossAttention, SelfAttention
from nmt.models.blocks import FEED_FORWARDS, NORMS, RESIDUALS, Embedding, FeedForward, Residual
from nmt.models.training_ops import Dropout, Linear
from nmt.models.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer, Transformer

LINEAR = (Linear, nn.Linear)
_DROPOUT = (Dropout, nn.Dropout)
_NORM = (nn.LayerNorm,)

# What stands where in a part whose weights are taken over.
_PARTS: dict[type[nn.Module], dict[str, tuple[type[nn.Module], ...]]] = {
    Transformer: {"encoder": (Encoder,), "decoder": (Decoder,)},
    Encoder: {"embedding": (Embedding,), "layers": (nn.ModuleList,), "final_norm": (*_NORM, nn.Identity)},
    Decoder: {"embedding": (Embedding,), "layers": (nn.ModuleList,), "final_norm": (*_NORM, nn.Identity)},
    DecoderLayer: {
        "self_attention": (SelfAttention,),
        "cross_attention": (CrossAttention,),
        "feed_forward": (FeedForward,),
        "around_self_attention": (Residual,),
        "around_cross_attention": (Residual,),
        "around_feed_forward": (Residual,),
    },
    EncoderLayer: {
        "self_attention": (SelfAttention,),
        "feed_forward": (FeedForward,),
        "around_attention": (Residual,),
        "around_feed_forward": (Residual,),
    },
    SelfAttention: {"qkv_proj": LINEAR, "out_proj": LINEAR},
    CrossAttention: {"q_proj": LINEAR, "kv_proj": LINEAR, "out_proj": LINEAR},
    **{x: {"expand": LINEAR, "contract": LINEAR, "dropout": _DROPOUT} for x in FEED_FORWARDS},
    **{x: {"norm": _NORM, "dropout": _DROPOUT} for x in RESIDUALS},
    Embedding: {"tokens": (nn.Embedding,), "norm": (*_NORM, nn.Identity), "dropout": _DROPOUT},
}
_VARIANTS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.LayerNorm: NORMS,
    FeedForward: FEED_FORWARDS,
    Residual: RESIDUALS,
}
# Parts whose linear maps may be replaced by faster ones: they do nothing with them but call them.
CONTAINERS = (Encoder, nn.ModuleList, EncoderLayer, SelfAttention, *FEED_FORWARDS[1:])


def find_stranger(model: object, *, within_encoder: bool, with_variants: bool = False) -> str | None:
    """Return the first part of a model, by name and class, that is not just what its class says.

    Args:
        model: The model; one of another class than the Transformer is a stranger as a whole.
        within_encoder: Whether what stands in the encoder counts, too, or only the encoder as such.
        with_variants: Whether the variants of a part are known, such as another normalisation.
    """
    runs_as_it_is = () if within_encoder else (Encoder,)
    return next(_strangers(model, (Transformer,), "the model", runs_as_it_is, with_variants), None)


def why_padded(model: nn.Module) -> str | None:
    """Return what of a model may know padded batches alone, as a line says it; None if it takes packed ones."""
    if not isinstance(model, Transformer):
        return f"the model ({type(model).__name__}) is not the Transformer of this package"
    if not model.is_whole:
        return "LayerDrop leaves layers out of padded batches alone"
    stranger = find_stranger(model, within_encoder=True)
    return None if stranger is None else f"{stranger} may know padded batches alone"


def is_known(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Return whether a part, with all that is in it, is just what one of these classes makes."""
    return next(_strangers(module, types, ""), None) is None


def is_as_its_class(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Return whether a part itself is of one of these classes, not of a subclass, and unchanged."""
    return type(module) in types and _fault(module) is None


def _strangers(
    module: object,
    types: tuple[type[nn.Module], ...],
    name: str,
    runs_as_it_is: tuple[type[nn.Module], ...] = (),
    with_variants: bool = False,
) -> Iterator[str]:
    """Yield what is strange about a part that should be of one of these classes, and about the parts in it."""
    if with_variants:
        types = tuple(variant for type_ in types for variant in _VARIANTS.get(type_, (type_,)))
    if type(module) not in types:
        known = " or ".join(dict.fromkeys(type_.__name__ for type_ in types))
        yield f"`{name}`, which is of the class {type(module).__name__} and not {known},"
        return
    assert isinstance(module, nn.Module)
    if (fault := _fault(module)) is not None:
        yield f"`{name}` ({type(module).__name__}), which {fault},"
        return
    if type(module) in runs_as_it_is:
        return
    prefix = "" if isinstance(module, Transformer) else f"{name}."
    for part, expected in _PARTS.get(type(module), {}).items():
        own = getattr(module, part, None)
        yield from _strangers(own, expected, f"{prefix}{part}", runs_as_it_is, with_variants)
    if isinstance(module, nn.ModuleList):
        for number, layer in enumerate(module):
            layers = (EncoderLayer, DecoderLayer)
            yield from _strangers(layer, layers, f"{prefix}{number}", with_variants=with_variants)


def _fault(module: nn.Module) -> str | None:
    """Return in what a module computes something else than its class and its weights say, if it does."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks"
    for name, value in vars(module).items():
        if callable(getattr(type(module), name, None)) and not _is_its_own(value, module, name):
            return f"has a `{name}` of its own"
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and type(tensor) not in (nn.Parameter, Tensor):
            return f"has a `{name}` of the type {type(tensor).__name__}"
    if isinstance(module, FeedForward) and isinstance(module.activation, nn.Module):
        return "has a module for its activation"
    if isinstance(module, (nn.Linear, nn.LayerNorm)):
        for name in ("weight", "bias"):
            if name not in module._parameters or module._parameters[name] is None:
                return f"has no {name} among its parameters"
    return None


def _is_its_own(value: object, module: nn.Module, name: str) -> bool:
    """Return whether an attribute that hides a method calls just that: so `torch.compile` is put around it."""
    method = inspect.unwrap(value) if callable(value) else value
    return (
        inspect.ismethod(method)
        and method.__self__ is module
        and method.__func__ is getattr(type(module), name)
    )
