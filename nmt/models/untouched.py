"""Find out whether a Transformer is computed only by unchanged code of this package and of PyTorch.

`known_parts.py` looks at the parts of one model. This module looks at their classes, and at the functions that
these call. A replacement for a method or a function was compiled from another file. This shows whenever the
replacement was made, and however it is wrapped.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_modules

from nmt.models import (
    attention,
    blocks,
    decoder_state,
    inference,
    inference_parts,
    inference_state,
    training_ops,
    transformer,
)
from nmt.models.known_parts import find_stranger
from nmt.models.transformer import DecoderLayer, Transformer
from nmt.system import onednn

_MODULES = (
    onednn,
    attention,
    blocks,
    decoder_state,
    inference,
    inference_parts,
    inference_state,
    training_ops,
    transformer,
)
_METHODS_OF_TORCH: tuple[tuple[type, str], ...] = (
    *((cls, "forward") for cls in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.Identity)),
    *((nn.Module, name) for name in ("_wrapped_call_impl", "_call_impl", "__getattr__")),
    *((nn.ModuleList, name) for name in ("__iter__", "__len__", "__getitem__")),
)
_FUNCTIONS_OF_TORCH = ("linear", "layer_norm", "embedding", "relu", "gelu", "scaled_dot_product_attention")
_OWN_FOLDER = str(Path(__file__).parents[1] / "_")[:-1]
_TORCH_FOLDER = str(Path(torch.__file__).parent / "_")[:-1]
_OF_TYPES = ("typing", "collections.abc", "builtins")
# The files of the methods that dataclasses and named tuples generate.
_GENERATORS = {
    "<string>",
    *(str(module.__file__) for module in (dataclasses, functools, typing, sys.modules["collections"])),
}


def is_untouched(model: Transformer) -> bool:
    """Return whether a model in evaluation mode computes exactly what its options and weights say.

    Then both forms are code of this package, and its tests compare just these two over all options. Nothing about
    such a model is unknown to the tests.
    """
    return (
        find_stranger(model, within_encoder=True) is None
        and not any(module.training for module in model.modules())
        and not torch_modules._global_forward_hooks
        and not torch_modules._global_forward_pre_hooks
        and _has_usual_sizes(model)
        and is_code_untouched()
    )


def is_code_untouched() -> bool:
    """Return whether nobody has replaced a method or a function that models call."""
    of_torch = (
        *((name, vars(cls)[name]) for cls, name in _METHODS_OF_TORCH),
        *((name, getattr(F, name)) for name in _FUNCTIONS_OF_TORCH),
        ("_wrapped_call_impl", vars(nn.Module)["__call__"]),
    )
    return all(map(_is_module_untouched, _MODULES)) and all(
        getattr(function, "__name__", None) == name and _is_of(function, _TORCH_FOLDER)
        for name, function in of_torch
    )


def _is_module_untouched(module: ModuleType) -> bool:
    values = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    classes = [x for x in values.values() if isinstance(x, type) and x.__module__ == module.__name__]
    methods = (
        (name, getattr(value, "__func__", value))
        for cls in classes
        for name, value in vars(cls).items()
        if name != "__repr__"
    )
    return all(_is_as_written(name, value) for name, value in (*values.items(), *methods))


def _is_as_written(name: str, value: Any) -> bool:
    """Return whether the value of a name in our modules or classes is our own, or is not a function."""
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__wrapped__", value) if isinstance(value, functools._lru_cache_wrapper) else value
    if isinstance(value, FunctionType):
        own = value.__name__ == name and _is_of(value, _OWN_FOLDER, _TORCH_FOLDER)
        is_generated = value.__code__.co_filename in _GENERATORS
        return own or (is_generated and not hasattr(value, "__wrapped__"))
    # Classes are checked by `known_parts.py`, where a model is made of them.
    return not callable(value) or isinstance(value, type) or type(value).__module__ in _OF_TYPES


def _is_of(function: Any, *folders: str) -> bool:
    """Return whether a function and all its wrappers were compiled from files in these folders."""
    if not isinstance(function, FunctionType):  # written in C++
        return type(function).__name__ == "builtin_function_or_method"
    inner = getattr(function, "__wrapped__", None)
    return function.__code__.co_filename.startswith(folders) and (inner is None or _is_of(inner, *folders))


def _has_usual_sizes(model: Transformer) -> bool:
    """Return whether all decoder layers have as many heads, and products of the sizes that their classes make."""
    layers = [cast(DecoderLayer, layer) for layer in model.decoder.layers]
    dim = model.decoder.embedding.tokens.embedding_dim
    heads = {x.num_heads for layer in layers for x in (layer.self_attention, layer.cross_attention)}
    return (
        len(heads) == 1
        and dim % next(iter(heads)) == 0
        and model.output_weight.shape == (len(model.output_weight), dim)
        and all(
            (linear.weight.size(0), linear.bias.size(0)) == (rows, rows)
            for layer in layers
            for linear, rows in (
                (layer.self_attention.qkv_proj, 3 * dim),
                (layer.self_attention.out_proj, dim),
                (layer.cross_attention.q_proj, dim),
                (layer.cross_attention.kv_proj, 2 * dim),
                (layer.cross_attention.out_proj, dim),
                (layer.feed_forward.contract, dim),
            )
        )
    )
