"""Choose the form of a model that searches: a fast form if it surely computes the same, else the model itself.

Any `SearchModel` can search as it is. The Transformer has a fast form. A model of another package can have its own
fast form, by `@search_form.register(ItsClass)`.

`inference.py` copies weights out of a model's parts, so it must know what these parts compute. A part of another
class, or one that is parametrised, hooked or patched, is a stranger. Strangers in the encoder run as they are.
With a stranger in the decoder, the whole model runs as it is. If anything is unknown to the tests of this package
(`untouched.py`), both forms first compute a small batch, and their results are compared.

Shapes: B sentences, K beam size, R = B*K rows, S source length, T target length, D model, V vocabulary.
"""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from nmt.errors import UserError, shown
from nmt.models.inference import InferenceTransformer
from nmt.models.known_parts import find_stranger
from nmt.models.protocols import SearchModel, TranslationModel
from nmt.models.transformer import DecoderLayer, Transformer
from nmt.models.untouched import is_untouched
from nmt.system.out_of_memory import is_out_of_memory

_BEAM = 2
_SOURCE_LENGTH = 3
_NUM_STEPS = 2  # the first, which is computed once for a sentence, and one that attends to earlier tokens
# Shares of the largest hidden state. Rounding is far below them; a difference that changes translations far above.
_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3}
_TOLERANCE = 0.1  # for types with fewer digits
_TOLERANCE_OF_OTHER_TYPES = 0.3  # for one block in another type: wrong products are very wrong
_TOLERANCE_OF_TF32 = 0.03  # for products on a GPU that leave out digits
# What a part may raise if it is called in a way, or with sizes, that it does not know.
_FAULTS = (
    TypeError,
    AttributeError,
    RuntimeError,
    ValueError,
    LookupError,
    AssertionError,
    NotImplementedError,
)


class SearchForm(NamedTuple):
    """The form that searches; and a remark if it is not the form that was asked for."""

    model: SearchModel
    remark: str | None


@singledispatch
def search_form(model: TranslationModel, dtype: torch.dtype | None = None) -> SearchForm:
    """Return the form of a model that searches: the model itself, unless its class has its own fast form.

    Args:
        model: In evaluation mode. It is not changed.
        dtype: The type to compute in; the model's own type if left out. The model as it is keeps its own type.

    Raises:
        UserError: The model cannot search, or not in 8-bit integers, or it cannot compute a batch.
    """
    name = type(model).__name__
    missing = [part for part in vars(SearchModel) if part[0] != "_" and not hasattr(model, part)]
    if missing:
        raise UserError(
            f"The model must have `{'`, `'.join(missing)}` to translate, but a {name} has not. See `SearchModel` "
            "in nmt/models/protocols.py; to train without translating, give --no-eval-bleu."
        )
    if dtype == torch.int8:
        raise UserError(
            f"`precision` must be fp32 or bf16 with a {name}, but is int8, which is made for the Transformer. "
            "Take one of those."
        )
    assert not model.training, "call model.eval() before"
    if dtype in (None, model.dtype):
        return SearchForm(model, None)
    return SearchForm(model, f"a {name} has no form for other types: {_as_it_is(model, dtype)}")


@search_form.register(Transformer)
def _of_transformer(model: Transformer, dtype: torch.dtype | None = None) -> SearchForm:
    """Return the fast form of a Transformer, or the model itself if the fast form would not compute the same."""
    assert not model.training, "call model.eval() before"
    if (stranger := find_stranger(model, within_encoder=False, with_variants=True)) is not None:
        _compute_small_batch(model)
        return SearchForm(
            model, f"{stranger} is unknown to the fast form of the decoder: {_as_it_is(model, dtype)}"
        )
    if dtype == torch.int8 and (variant := find_stranger(model, within_encoder=False)) is not None:
        raise UserError(
            f"`precision` must be fp32 or bf16 with {variant} but is int8, which does not know it. Take one of "
            "those."
        )
    try:
        form, difference, tolerance = _compared(model, dtype)
    except _FAULTS as error:
        if is_out_of_memory(error):
            raise
        _compute_small_batch(model)
        return SearchForm(
            model,
            f"the fast form of the decoder cannot compute it ({_named(error)}): {_as_it_is(model, dtype)}",
        )
    if difference > tolerance:
        return SearchForm(
            model,
            f"the fast form of the decoder computes something else than the model (hidden states differ by "
            f"{difference:.1%} of the largest): {_as_it_is(model, dtype)}",
        )
    return SearchForm(form, None)


def _compared(model: Transformer, dtype: torch.dtype | None) -> tuple[InferenceTransformer, float, float]:
    """Return the fast form of a model, how far it is from the model, and how far it may be."""
    form = InferenceTransformer(model, dtype)
    if is_untouched(model):
        # Then only the packed products of this machine are still to be checked.
        if dtype == torch.int8:
            return form, 0.0, 0.0
        return form, block_difference(form, model), _tolerance(model.output_weight, form.product_dtype)
    # Other types round by design. So the copied weights, and how they are combined, are checked in the model's own
    # type.
    same_type = form if dtype is None else InferenceTransformer(model, packs=False)
    return form, relative_difference(same_type, model), _tolerance(model.output_weight)


@torch.inference_mode()
def block_difference(form: InferenceTransformer, model: Transformer) -> float:
    """Let one feed-forward block compute two rows in both forms; return their difference, as a share as well."""
    layer = cast(DecoderLayer, model.decoder.layers[0])
    table = model.decoder.embedding.tokens.weight
    rows = model.decoder.embedding(_some_tokens(table, (2, 1), model.pad_id))[:, 0]  # (2, D)
    with torch.autocast(rows.device.type, enabled=False):
        found = form.layers[0].feed_forward(rows.to(form.product_dtype))
        return _difference(found.double(), layer.feed_forward(rows).double())


def bytes_of_a_row(form: SearchModel, model: TranslationModel) -> tuple[int, int]:
    """Return the size of the largest new tensors of a step, in bytes a row: of the logits, and of all others.

    Args:
        form: The form that searches.
        model: The model that it is a form of.
    """
    vocabulary_size = model.output_weight.size(0)
    if isinstance(form, InferenceTransformer):
        return vocabulary_size * form.dtype.itemsize, form.widest_product * form.product_dtype.itemsize
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    tables = {id(x.weight) for x in modules if isinstance(x, nn.Embedding)} | {id(model.output_weight)}
    matrices = [x for module in modules for x in module.parameters(recurse=False) if x.dim() == 2]
    widest = max((x.size(0) for x in matrices if id(x) not in tables), default=0)
    return vocabulary_size * form.dtype.itemsize, widest * form.dtype.itemsize


@torch.inference_mode()
def relative_difference(form: InferenceTransformer, model: Transformer) -> float:
    """Let both encode and decode a small batch; return their difference, as a share of the largest number.

    The batch has two sources of different lengths. Each has two hypotheses that branch after their first token.
    """
    source, target = _small_batch(model)
    with torch.autocast(source.device.type, enabled=False):
        expected = model.features(target, model.encode(source))  # (R, T, D)
        memory, state = form.encode(source), form.start_state()
        found = torch.stack([form.step(x, memory, state) for x in target.unbind(dim=1)], dim=1)
        parts = [(found, expected)]
        # Only the logits of the last position: those of all positions would take most of the time.
        parts.append((form.project(found[:, -1]) + form.logit_offset, model.project(expected[:, -1])))
    return max(_difference(a.double(), b.double()) for a, b in parts)


@torch.inference_mode()
def _compute_small_batch(model: Transformer) -> None:
    """Raise `UserError` if a model cannot compute at all, for example if a part does not fit its inputs."""
    try:
        source, target = _small_batch(model)
        with torch.autocast(source.device.type, enabled=False):
            model.project(model.features(target, model.encode(source))[:, -1])
    except _FAULTS as error:
        if is_out_of_memory(error):
            raise
        stranger = find_stranger(model, within_encoder=True)
        look_at = "its sizes" if stranger is None else stranger.removesuffix(",")
        raise UserError(
            f"`model` must be able to compute a batch, but ends with {_named(error)}. Look at {look_at}."
        ) from error


def _named(error: Exception) -> str:
    first_line = next(iter(str(error).splitlines()), "").rstrip(".")
    return f"{type(error).__name__}: {shown(first_line)}"


def _small_batch(model: Transformer) -> tuple[Tensor, Tensor]:
    """Return sources (2, S) and targets (2K, T)."""
    num_steps = min(_NUM_STEPS, model.max_target_positions)
    source = _some_tokens(
        model.encoder.embedding.tokens.weight,
        (2, min(_SOURCE_LENGTH, model.max_source_positions)),
        model.pad_id,
    )
    source[1, source.size(1) // 2 + 1 :] = model.pad_id
    target = _some_tokens(model.output_weight, (2 * _BEAM, num_steps), model.pad_id)
    target[1::_BEAM, 0] = target[::_BEAM, 0]  # the hypotheses of a sentence begin alike
    return source, target


def _difference(found: Tensor, expected: Tensor) -> float:
    if not expected.isfinite().all():  # nothing can be said about such a model
        return 0.0
    return (
        ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).nan_to_num(torch.inf).item()
    )


def _some_tokens(table: Tensor, shape: tuple[int, int], pad_id: int) -> Tensor:
    """Return tokens from all over a vocabulary (V, D), none of them padding."""
    number = shape[0] * shape[1]
    tokens = torch.linspace(0, len(table) - 1, number, device=table.device).long().view(shape)
    return tokens.masked_fill_(tokens == pad_id, len(table) - 1)


def _tolerance(weight: Tensor, dtype: torch.dtype | None = None) -> float:
    """Return how far two forms may be apart; `dtype` is the type of the products, if not that of the weight."""
    if dtype is not None and dtype != weight.dtype:
        return _TOLERANCE_OF_OTHER_TYPES
    if (
        weight.device.type == "cuda"
        and weight.dtype == torch.float32
        and torch.backends.cuda.matmul.allow_tf32
    ):
        return _TOLERANCE_OF_TF32
    return _TOLERANCES.get(weight.dtype, _TOLERANCE)


def _as_it_is(model: SearchModel, dtype: torch.dtype | None) -> str:
    own = str(model.dtype).removeprefix("torch.")
    in_type = "" if dtype in (None, model.dtype) else f", in {own}"
    return f"translations are by the model as it is{in_type}, which takes longer"
