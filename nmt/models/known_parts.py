"""Find parts of a Transformer that compute something else than their classes and weights say."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import Tensor, nn

from nmt.models.attention import CrossAttention, SelfAttention
from nmt.models.blocks import FEED_FORWARDS, NORMS, RESIDUALS, Embedding, FeedForward, Residual
from nmt.models.training_ops import DROPOUTS, LINEARS
from nmt.models.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer, Transformer

_NORM = (nn.LayerNorm,)

# For each part whose weights are read: its attributes, and the classes that they may have.
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
    SelfAttention: {"qkv_proj": LINEARS, "out_proj": LINEARS},
    CrossAttention: {"q_proj": LINEARS, "kv_proj": LINEARS, "out_proj": LINEARS},
    **{x: {"expand": LINEARS, "contract": LINEARS, "dropout": DROPOUTS} for x in FEED_FORWARDS},
    **{x: {"norm": _NORM, "dropout": DROPOUTS} for x in RESIDUALS},
    Embedding: {"tokens": (nn.Embedding,), "norm": (*_NORM, nn.Identity), "dropout": DROPOUTS},
}
_VARIANTS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.LayerNorm: NORMS,
    FeedForward: FEED_FORWARDS,
    Residual: RESIDUALS,
}
# Parts whose linear maps may be replaced by faster ones, because these parts only call them.
CONTAINERS = (Encoder, nn.ModuleList, EncoderLayer, SelfAttention, *FEED_FORWARDS[1:])


def find_stranger(model: object, *, within_encoder: bool, with_variants: bool = False) -> str | None:
    """Return the name and class of the first stranger: a part that is not exactly what its class says.

    Args:
        model: The model. If it is not a `Transformer`, it is a stranger as a whole.
        within_encoder: Whether to look at the parts of the encoder, too, or only at the encoder as a whole.
        with_variants: Whether variants of a part count as known, such as another normalisation.
    """
    runs_as_it_is = () if within_encoder else (Encoder,)
    return next(_strangers(model, (Transformer,), "the model", runs_as_it_is, with_variants), None)


def why_padded(model: nn.Module) -> str | None:
    """Return, as text for a message, which part may need padded batches; None if the model takes packed ones."""
    if not isinstance(model, Transformer):
        return f"the model ({type(model).__name__}) is not the Transformer of this package"
    if not model.is_whole:
        return "LayerDrop leaves layers out of padded batches alone"
    stranger = find_stranger(model, within_encoder=True)
    return None if stranger is None else f"{stranger} may know padded batches alone"


def is_known(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Return whether a part, with all parts in it, is exactly what one of these classes makes."""
    return next(_strangers(module, types, ""), None) is None


def is_as_its_class(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Return whether a part itself is unchanged and of one of these classes, not of a subclass."""
    return type(module) in types and _fault(module) is None


def _strangers(
    module: object,
    types: tuple[type[nn.Module], ...],
    name: str,
    runs_as_it_is: tuple[type[nn.Module], ...] = (),
    with_variants: bool = False,
) -> Iterator[str]:
    """Yield what is strange about a part that should have one of these classes, and about the parts in it."""
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
    """Return why a module may compute something else than its class and weights say, or None."""
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
    """Return whether an attribute that hides a method only calls that method, as `torch.compile` does."""
    method = inspect.unwrap(value) if callable(value) else value
    return (
        inspect.ismethod(method)
        and method.__self__ is module
        and method.__func__ is getattr(type(module), name)
    )
