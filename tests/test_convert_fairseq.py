"""Checkpoints of fairseq's Transformer become models that compute the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import fairseq_model
from support.fairseq_model import PLAIN, checkpoint, make_weights, under_old_names, write_dictionaries

from nmt.checkpoints.model_folder import load_model
from nmt.errors import UserError
from nmt.interop.fairseq import Conversion, convert_checkpoint
from nmt.models.transformer import Transformer
from nmt.translation.translator import Translator

SOURCE_SIZE, TARGET_SIZE = 16, 24

PRE_NORM = {"encoder_normalize_before": True, "decoder_normalize_before": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pre-norm": PRE_NORM,
    "pre-norm encoder alone": {"encoder_normalize_before": True},
    "one matrix": {"share_all_embeddings": True, "share_decoder_input_output_embed": True},
    "decoder's matrix for output": {"share_decoder_input_output_embed": True},
    "learned positions": {"encoder_learned_pos": True, "decoder_learned_pos": True},
    "learned target positions": {"decoder_learned_pos": True},
    "gelu": {"activation_fn": "gelu"},
    "normalised embedding": {"layernorm_embedding": True},
    "no scale": {"no_scale_embedding": True},
    "decoder of another width": {"decoder_embed_dim": 12},
    "everything": {
        **PRE_NORM,
        "share_all_embeddings": True,
        "encoder_learned_pos": True,
        "activation_fn": "gelu",
        "layernorm_embedding": True,
        "no_scale_embedding": True,
    },
}


def convert(
    folder: Path, content: dict[str, Any], *, zip_format: bool = True, **languages: str
) -> Conversion:
    torch.save(content, folder / "checkpoint.pt", _use_new_zipfile_serialization=zip_format)
    named = {"source_lang": languages.get("source"), "target_lang": languages.get("target")}
    return convert_checkpoint(folder / "checkpoint.pt", folder, folder / "model", **named)


def sizes(settings: dict[str, Any]) -> dict[str, int]:
    source_size = TARGET_SIZE if settings["share_all_embeddings"] else SOURCE_SIZE
    return {"source_size": source_size, "target_size": TARGET_SIZE}


# Old attention kept q, k and v in one matrix, so both sides were of one width.
@pytest.mark.parametrize(
    ("name", "old"),
    [
        (name, old)
        for name in VARIANTS
        for old in (False, True)
        if not (old and name == "decoder of another width")
    ],
)
def test_the_converted_model_computes_what_fairseq_computes(tmp_path: Path, name: str, old: bool) -> None:
    settings = PLAIN | VARIANTS[name]
    write_dictionaries(tmp_path, **sizes(settings))
    state = make_weights(settings, **sizes(settings))
    written = under_old_names(state) if old else state
    convert(tmp_path, checkpoint(settings, written, old=old), zip_format=not old)

    model, _ = load_model(tmp_path / "model")
    assert isinstance(model, Transformer)
    source, target_input = torch.tensor([5, 9, 4, 11, 2]), torch.tensor([2, 7, 15, 4])
    with torch.inference_mode():
        ours = model.decode(target_input[None], model.encode(source[None]))[0]
    expected = fairseq_model.logits(state, settings, source, target_input)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


def test_half_precision_and_missing_settings(tmp_path: Path) -> None:
    # Flags that a release did not know are off; weights of half precision keep their values.
    settings = PLAIN
    known = {key: value for key, value in settings.items() if value is not False and key != "activation_fn"}
    write_dictionaries(tmp_path, **sizes(settings))
    state = {name: tensor.half() for name, tensor in make_weights(settings, **sizes(settings)).items()}
    convert(tmp_path, checkpoint(known, state, old=True))
    model, _ = load_model(tmp_path / "model")
    weight = model.state_dict()["encoder.embedding.tokens.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["encoder.embed_tokens.weight"].float())


def test_it_translates_pieces(tmp_path: Path) -> None:
    write_dictionaries(tmp_path, **sizes(PLAIN))
    convert(tmp_path, checkpoint(PLAIN, make_weights(PLAIN, **sizes(PLAIN))))
    (text,) = Translator.load(tmp_path / "model").translate(["w1 w2  w3"], beam=2, max_len_a=0, max_len_b=3)
    known = {line.split(" ")[0] for line in (tmp_path / "dict.de.txt").read_text().splitlines()}
    assert set(text.split(" ")) <= {*known, "<unk>"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"activation_fn": "swish"}, "`activation_fn` is 'swish'"),
        ({"adaptive_softmax_cutoff": "1,2"}, "`adaptive_softmax_cutoff` is '1,2'"),
        ({"no_cross_attention": True}, "`no_cross_attention` is True"),
        ({"no_token_positional_embeddings": True}, "`no_token_positional_embeddings` is True"),
        ({"decoder_output_dim": 4}, "`decoder_output_dim` is 4"),
        ({"task": "language_modeling"}, "its task is `language_modeling`"),
        ({"encoder_layers": 1}, "it has the weights `encoder.layers.1."),
        ({"encoder_layers": 3}, "has no weights `encoder.layers.2."),
        ({"encoder_ffn_embed_dim": 13}, "is (12, 8)"),
        ({"encoder_attention_heads": 3}, "must be a multiple of `encoder-attention-heads`"),
        ({"share_decoder_input_output_embed": True}, "differs from it"),
        ({"layernorm_embedding": True}, "has no weights `encoder.layernorm_embedding.weight`"),
    ],
)
def test_what_is_outside_is_named(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    write_dictionaries(tmp_path, **sizes(PLAIN))
    content = checkpoint(PLAIN | change, make_weights(PLAIN, **sizes(PLAIN)), old=True)
    with pytest.raises(UserError) as error:
        convert(tmp_path, content)
    assert text in str(error.value)
    assert not (tmp_path / "model").exists()


def test_an_old_prenorm_stack_without_a_final_norm_is_outside(tmp_path: Path) -> None:
    settings = PLAIN | PRE_NORM
    write_dictionaries(tmp_path, **sizes(settings))
    state = make_weights(settings, **sizes(settings)) | {"decoder.version": torch.tensor([2.0])}
    with pytest.raises(UserError, match="its decoder is pre-norm of version 2"):
        convert(tmp_path, checkpoint(settings, state))


def test_dictionaries_of_another_size_are_refused(tmp_path: Path) -> None:
    write_dictionaries(tmp_path, source_size=SOURCE_SIZE, target_size=TARGET_SIZE + 1)
    with pytest.raises(UserError, match=r"dict.de.txt` must have 24 types .* but has 25"):
        convert(tmp_path, checkpoint(PLAIN, make_weights(PLAIN, **sizes(PLAIN))))


def test_which_language_is_the_source(tmp_path: Path) -> None:
    settings = PLAIN | {"source_lang": None, "target_lang": None}
    content = checkpoint(settings, make_weights(settings, **sizes(settings)))
    cases: dict[str, tuple[list[str], dict[str, str]]] = {
        "sizes": ([], {}),
        "data": (["test.en-de.en.idx", "test.en-de.de.idx"], {}),
        "option": ([], {"source": "en"}),
    }
    for name, (files, languages) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        write_dictionaries(folder, **sizes(settings))
        for file in files:
            (folder / file).touch()
        done = convert(folder, content, **languages)
        assert (done.source_lang, done.target_lang, done.is_guessed) == ("en", "de", False)


def test_two_dictionaries_of_one_size_must_be_told_apart(tmp_path: Path) -> None:
    settings = PLAIN | {"source_lang": None, "target_lang": None}
    write_dictionaries(tmp_path, source_size=TARGET_SIZE, target_size=TARGET_SIZE)
    state = make_weights(settings, source_size=TARGET_SIZE, target_size=TARGET_SIZE)
    other = tmp_path / "dict.de.txt"
    other.write_text(other.read_text().replace("w1 ", "v1 "))
    with pytest.raises(UserError, match="Name them with `--source-lang` and `--target-lang`"):
        convert(tmp_path, checkpoint(settings, state))
    other.write_text((tmp_path / "dict.en.txt").read_text())
    assert convert(tmp_path, checkpoint(settings, state)).is_guessed
