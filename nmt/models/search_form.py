"""Which form of a model searches for translations: the fast one if it is sure to compute the same, else the model.

`inference.py` copies weights out of a model's parts, so it must know what these compute. A part of another class,
or one that is parametrised, hooked or patched, is a stranger. In the encoder strangers run as they are; with one
in the decoder the whole model does. For what nobody can see in a model, both forms compute a small batch first.

Shapes: B sentences, K beam size, R = B*K rows, S source length, T target length, D model, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nmt.models.inference import InferenceTransformer
from nmt.models.known_parts import find_stranger
from nmt.models.transformer import Transformer

_BEAM = 2
_SOURCE_LENGTH = 3
_NUM_STEPS = 2  # the one that is computed once a sentence, and one that looks at a past
# Of the largest hidden state: rounding is far below, and what changes a translation far above.
_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3}
_TOLERANCE = 0.1  # of types with less digits
_TOLERANCE_OF_TF32 = 0.03  # products on a GPU that leave out digits


class SearchForm(NamedTuple):
    """What searches, and why it is not the fast form, if it is not."""

    model: InferenceTransformer | Transformer
    remark: str | None


def search_form(model: Transformer, dtype: torch.dtype | None = None) -> SearchForm:
    """Return the fast form of a model in evaluation mode, or the model itself where that would be another model.

    Args:
        model: It is not changed.
        dtype: As for `InferenceTransformer`. The model itself keeps its own type.
    """
    if (stranger := find_stranger(model, within_encoder=False)) is not None:
        return SearchForm(
            model, f"{stranger} is unknown to the fast form of the decoder: {_as_it_is(model, dtype)}"
        )
    form = InferenceTransformer(model, dtype)
    # Other types round by design. What is copied, and how it is put together, shows in the model's own type.
    same_type = form if dtype is None else InferenceTransformer(model, packs=False)
    if (difference := relative_difference(same_type, model)) > _tolerance(model.output_weight):
        return SearchForm(
            model,
            f"the fast form of the decoder computes something else than the model (hidden states differ by "
            f"{difference:.1%} of the largest): {_as_it_is(model, dtype)}",
        )
    return SearchForm(form, None)


@torch.inference_mode()
def relative_difference(form: InferenceTransformer, model: Transformer) -> float:
    """Let both encode and decode a small batch; return how far they are apart, as a share of the largest number.

    Two sources of different lengths, for each two hypotheses that branch after their first token.
    """
    device = model.output_weight.device
    num_steps = min(_NUM_STEPS, model.max_target_positions)
    source = _some_tokens(
        model.encoder.embedding.tokens.weight,
        (2, min(_SOURCE_LENGTH, model.max_source_positions)),
        model.pad_id,
    )
    source[1, source.size(1) // 2 + 1 :] = model.pad_id
    target = _some_tokens(model.output_weight, (2 * _BEAM, num_steps), model.pad_id)
    target[1::_BEAM, 0] = target[::_BEAM, 0]  # the hypotheses of a sentence begin alike
    with torch.autocast(device.type, enabled=False):
        expected = model.features(target, model.encode(source))  # (R, T, D)
        memory, state = form.encode(source), form.start_state()
        found = torch.cat([form.features(x, memory, state) for x in target.split(1, dim=1)], dim=1)
        parts = [(found, expected)]
        # Logits of the last position alone, since all would take most of the time.
        parts.append((form.project(found[:, -1]) + form.logit_offset, model.project(expected[:, -1])))
    return max(_difference(a.double(), b.double()) for a, b in parts)


def _difference(found: Tensor, expected: Tensor) -> float:
    if not expected.isfinite().all():  # of such a model nothing can be said
        return 0.0
    return (
        ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).nan_to_num(torch.inf).item()
    )


def _some_tokens(table: Tensor, shape: tuple[int, int], pad_id: int) -> Tensor:
    """Return tokens from all over a vocabulary (V, D), none of them padding."""
    number = shape[0] * shape[1]
    tokens = torch.linspace(0, len(table) - 1, number, device=table.device).long().view(shape)
    return tokens.masked_fill_(tokens == pad_id, len(table) - 1)


def _tolerance(weight: Tensor) -> float:
    if (
        weight.device.type == "cuda"
        and weight.dtype == torch.float32
        and torch.backends.cuda.matmul.allow_tf32
    ):
        return _TOLERANCE_OF_TF32
    return _TOLERANCES.get(weight.dtype, _TOLERANCE)


def _as_it_is(model: Transformer, dtype: torch.dtype | None) -> str:
    own = str(model.output_weight.dtype).removeprefix("torch.")
    in_type = "" if dtype in (None, model.output_weight.dtype) else f", in {own}"
    return f"translations are by the model as it is{in_type}, which takes longer"
