"""Export our Transformer as a model of CTranslate2, and check that it computes the same.

The weights go into CTranslate2's own specification classes, and its own converter writes the folder. Few
conventions differ: CTranslate2 calls the padding token `<blank>`, and its tables of positions begin with the first
position.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nmt.data.text import is_blank
from nmt.data.vocabulary import Vocabulary
from nmt.errors import UserError
from nmt.interop.agreement import Agreement, compare, name_of, own_translations
from nmt.models.attention import CrossAttention, SelfAttention
from nmt.models.blocks import Embedding, FeedForward, Residual
from nmt.models.known_parts import find_stranger
from nmt.models.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer, Transformer
from nmt.system.new_folder import new_folder
from nmt.system.places import check_new_folder
from nmt.translation.translator import Translator

Quantization = Literal["int8", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16"]

_QUANTIZED_TOLERANCE = 0.1  # of the mean difference of scores; beyond it the model is wrong, not just rounded
_EXAMPLES = 5


class DisagreementError(Exception):
    """The two models translate differently; the text says where."""


def export(
    translator: Translator, output: Path, sample: Sequence[str], *, quantization: Quantization | None
) -> tuple[Agreement, Agreement | None]:
    """Write a CTranslate2 folder, and translate a sample with both models.

    Args:
        translator: One model, on the CPU.
        output: The folder to write; it must not exist. It is made only if the two agree.
        sample: Lines to translate.
        quantization: How CTranslate2 is to store the weights; None for float32.

    Returns:
        How well CTranslate2 agrees in float32, and with the quantisation if there is one.

    Raises:
        UserError: CTranslate2 is missing or cannot hold the model, or the sample is blank.
        DisagreementError: The two translate differently. Nothing is written then.
    """
    check_new_folder(output, name="to")
    if all(map(is_blank, sample)):
        raise UserError("`sample` must have lines to translate, but is blank. Name other text.")
    engine = _import()
    spec = make_spec(translator)
    with tempfile.TemporaryDirectory() as scratch, new_folder(output) as folder:
        plain = written = Path(scratch) / "float32"
        _write(spec, plain, None)
        own = own_translations(translator, sample)
        exact = compare(translator, engine.Translator(str(plain), compute_type="float32"), own)
        if not exact.is_exact():
            raise DisagreementError("\n".join([str(exact), *exact.faults[:_EXAMPLES]]))
        quantized = None
        if quantization is not None:
            written = Path(scratch) / "quantized"
            _write(make_spec(translator), written, quantization)
            quantized = compare(translator, engine.Translator(str(written)), own)
            if quantized.mean_difference > _QUANTIZED_TOLERANCE:
                raise DisagreementError(f"in {quantization}: {quantized}")
        shutil.copytree(written, folder, dirs_exist_ok=True)
        translator.task.save_assets(folder)
    return exact, quantized


def make_spec(translator: Translator) -> Any:
    """Return CTranslate2's specification of a model, filled with its weights.

    Raises:
        UserError: CTranslate2 is missing, or cannot hold the model.
    """
    _import()
    from ctranslate2.specs import transformer_spec

    if len(translator.models) > 1:
        raise UserError(
            f"The model must be one for CTranslate2, but are {len(translator.models)} that vote. Convert one."
        )
    model, task = translator.models[0], translator.task
    if (stranger := find_stranger(model, within_encoder=True)) is not None:
        raise UserError(
            f"The model must be made of parts that CTranslate2 has, but it cannot hold {stranger[:-1]}. "
            "Translate with nmt-generate."
        )
    assert isinstance(model, Transformer)
    encoder = _fill_encoder(model.encoder)
    spec = transformer_spec.TransformerSpec(encoder, _fill_decoder(model))
    spec.register_source_vocabulary(_names(task.source_vocabulary, task.source_lang))
    spec.register_target_vocabulary(_names(task.target_vocabulary, task.target_lang))
    spec.config.decoder_start_token = spec.config.eos_token  # fairseq's convention
    spec.config.add_source_eos = True
    return spec


def _fill_encoder(encoder: Encoder) -> Any:
    from ctranslate2.specs import transformer_spec

    layers = [cast(EncoderLayer, layer) for layer in encoder.layers]
    spec = transformer_spec.TransformerEncoderSpec(*_size(layers), **_variant(layers[0], encoder.embedding))
    _fill_ends(spec, spec.embeddings[0], encoder)
    for filled, layer in zip(spec.layer, layers, strict=True):
        _fill_self_attention(filled.self_attention, layer.self_attention, layer.around_attention)
        _fill_feed_forward(filled.ffn, layer.feed_forward, layer.around_feed_forward)
    return spec


def _fill_decoder(model: Transformer) -> Any:
    from ctranslate2.specs import transformer_spec

    decoder = model.decoder
    layers = [cast(DecoderLayer, layer) for layer in decoder.layers]
    spec = transformer_spec.TransformerDecoderSpec(*_size(layers), **_variant(layers[0], decoder.embedding))
    _fill_ends(spec, spec.embeddings, decoder)
    spec.projection.weight = _array(model.output_weight)
    for filled, layer in zip(spec.layer, layers, strict=True):
        _fill_self_attention(filled.self_attention, layer.self_attention, layer.around_self_attention)
        _fill_cross_attention(filled.attention, layer.cross_attention, layer.around_cross_attention)
        _fill_feed_forward(filled.ffn, layer.feed_forward, layer.around_feed_forward)
    return spec


def _size(layers: Sequence[EncoderLayer] | Sequence[DecoderLayer]) -> tuple[int, int]:
    """Return the number of layers, and of heads."""
    return len(layers), layers[0].self_attention.num_heads


def _variant(layer: EncoderLayer | DecoderLayer, embedding: Embedding) -> dict[str, Any]:
    """Name the variants of a stack in CTranslate2's words."""
    from ctranslate2.specs.common_spec import Activation

    is_relu = layer.feed_forward.activation is torch.nn.functional.relu
    return {
        "pre_norm": layer.around_feed_forward.pre_norm,
        "activation": Activation.RELU if is_relu else Activation.GELU,
        "layernorm_embedding": isinstance(embedding.norm, nn.LayerNorm),
    }


def _fill_ends(spec: Any, embeddings: Any, stack: Encoder | Decoder) -> None:
    """Fill the parts before the layers of a stack, and the norm after them."""
    embedding = stack.embedding
    embeddings.weight = _array(embedding.tokens.weight)
    spec.scale_embeddings = embedding.scale
    spec.position_encodings.encodings = _array(embedding.positions[embedding.first_position :])
    if isinstance(embedding.norm, nn.LayerNorm):
        _fill_norm(spec.layernorm_embedding, embedding.norm)
    if isinstance(stack.final_norm, nn.LayerNorm):
        _fill_norm(spec.layer_norm, stack.final_norm)


def _fill_self_attention(spec: Any, attention: SelfAttention, around: Residual) -> None:
    _fill_linear(spec.linear[0], attention.qkv_proj)
    _fill_linear(spec.linear[1], attention.out_proj)
    _fill_norm(spec.layer_norm, around.norm)


def _fill_cross_attention(spec: Any, attention: CrossAttention, around: Residual) -> None:
    _fill_linear(spec.linear[0], attention.q_proj)
    _fill_linear(spec.linear[1], attention.kv_proj)
    _fill_linear(spec.linear[2], attention.out_proj)
    _fill_norm(spec.layer_norm, around.norm)


def _fill_feed_forward(spec: Any, feed_forward: FeedForward, around: Residual) -> None:
    _fill_linear(spec.linear_0, feed_forward.expand)
    _fill_linear(spec.linear_1, feed_forward.contract)
    _fill_norm(spec.layer_norm, around.norm)


def _fill_linear(spec: Any, linear: nn.Linear) -> None:
    spec.weight, spec.bias = _array(linear.weight), _array(linear.bias)


def _fill_norm(spec: Any, norm: nn.Module) -> None:
    assert isinstance(norm, nn.LayerNorm)
    spec.gamma, spec.beta = _array(norm.weight), _array(norm.bias)


def _array(weight: Tensor) -> NDArray[np.float32]:
    # A copy, because quantisation works in place.
    return np.array(weight.detach().float().cpu().numpy(), dtype=np.float32, order="C", copy=True)


def _names(vocabulary: Vocabulary, lang: str) -> list[str]:
    """Return CTranslate2's names of the tokens.

    Raises:
        UserError: Two ids have the same token, and CTranslate2 cannot tell them apart.
    """
    names = [name_of(token) for token in vocabulary.tokens]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"A vocabulary must have each token once for CTranslate2, but that of {lang} has `{twice}` twice. "
            "Translate with nmt-generate, or rename one in the model folder's dictionary."
        )
    return names


def _write(spec: Any, folder: Path, quantization: str | None) -> None:
    from ctranslate2.converters.converter import Converter

    class Filled(Converter):  # type: ignore[misc, unused-ignore]  # Any where the extra is missing
        def _load(self) -> Any:
            return spec

    try:
        Filled().convert(str(folder), quantization=quantization)
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"The model must be one that CTranslate2 can hold, but it says: {_sentence(error)} "
            "Translate with nmt-generate."
        ) from error


def _sentence(error: Exception) -> str:
    return f"{str(error).strip().rstrip('.')}."


def _import() -> Any:
    try:
        import ctranslate2
    except ImportError:
        raise UserError(
            "CTranslate2 must be installed to convert to it, but is missing. "
            'Run pip install "ctranslate2>=4.4".'
        ) from None
    return ctranslate2
