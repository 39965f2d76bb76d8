"""Our models in CTranslate2: the same translations and scores, for all variants; and how it is asked for."""

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_translation_model import write_learned_model, write_tiny_model

from nmt.checkpoints.model_folder import load_config, write_model_folder
from nmt.checkpoints.weights import weights
from nmt.cli.convert import main
from nmt.data.vocabulary import EOS_ID
from nmt.errors import UserError
from nmt.translation.translator import Translator

ctranslate2 = pytest.importorskip("ctranslate2")
from nmt.interop import agreement as agreement_module  # noqa: E402
from nmt.interop import ctranslate2 as exporter  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ORACLE = os.environ.get("NMT_FAIRSEQ_ORACLE")
PAIRS = {
    "A dog runs.": "Ein Hund läuft.",
    "Two dogs run.": "Zwei Hunde laufen.",
    "A cat sees two dogs.": "Eine Katze sieht zwei Hunde.",
    "Dogs see a cat.": "Hunde sehen eine Katze.",
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "pre-norm": {"encoder_normalize_before": True, "decoder_normalize_before": True},
    "pre-norm of the encoder alone": {"encoder_normalize_before": True},
    "gelu": {"activation_fn": "gelu"},
    "learned positions": {"encoder_learned_pos": True, "decoder_learned_pos": True},
    "normalised embeddings": {"layernorm_embedding": True},
    "no embedding scale": {"no_scale_embedding": True},
    "all shared": {"share_all_embeddings": True},
    "target shared": {"share_decoder_input_output_embed": True},
    "other depths": {"encoder_layers": 2, "decoder_layers": 3},
    "other heads": {"encoder_attention_heads": 4},
    "other widths": {"encoder_embed_dim": 24, "encoder_ffn_embed_dim": 40},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_learned_model(tmp_path_factory.mktemp("run") / "model", PAIRS)


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.en"
    path.write_text("\n".join([*PAIRS, "", "A cat runs."]) + "\n")
    return path


def own(translator: Translator, *lines: str) -> agreement_module.OwnTranslations:
    return agreement_module.own_translations(translator, lines or list(PAIRS))


def compare(translator: Translator, folder: Path, *lines: str) -> agreement_module.Agreement:
    return agreement_module.compare(translator, ctranslate2.Translator(str(folder)), own(translator, *lines))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_every_variant_translates_and_scores_alike(
    variant: Mapping[str, Any], tmp_path: Path, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_learned_model(tmp_path / "model", PAIRS, variant)
    main([str(folder), "--to", "ctranslate2", str(tmp_path / "ct2"), "--sample", str(sample)])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'ct2'}: CTranslate2 translates like the model"
    assert second.startswith("float32: 5 of 5 translations equal, 0 ties, 0 others; ")


def test_the_folder_is_all_that_ctranslate2_needs(model: Path, tmp_path: Path, sample: Path) -> None:
    main([str(model), "--to", "ctranslate2", str(tmp_path / "ct2"), "--sample", str(sample)])
    names = {path.name for path in (tmp_path / "ct2").iterdir()}
    assert {"model.bin", "config.json", "sentencepiece.model"} <= names
    engine = ctranslate2.Translator(str(tmp_path / "ct2"))
    segmenter = Translator.load(model).task.source_segmenter
    tokens = [segmenter.vocabulary.tokens[i] for i in segmenter.encode(["A dog runs."])[0]]
    (result,) = engine.translate_batch([tokens], beam_size=5)
    assert "".join(result.hypotheses[0]).replace("▁", " ").strip() == "Ein Hund läuft."


def test_quantising_is_compared_and_leaves_the_model_as_it_is(
    model: Path, tmp_path: Path, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--to", "ctranslate2", str(tmp_path / "ct2"), "--sample", str(sample)]
    main([str(model), *arguments, "--quantization", "int8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("translates like the model, what quantisation changes aside")
    assert lines[1].startswith("float32: 5 of 5 translations equal")
    assert re.match(r"int8: 5 of 5 translations equal, .* [1-9]\.\de-0\d on average", lines[2])
    # CTranslate2 quantises arrays in place: they must not be the model's own.
    translator = Translator.load(model)
    before = [parameter.clone() for parameter in translator.models[0].parameters()]
    exporter._write(exporter.make_spec(translator), tmp_path / "again", "int8")
    assert all(
        torch.equal(old, new) for old, new in zip(before, translator.models[0].parameters(), strict=True)
    )


def test_a_difference_is_said_with_exit_code_1_and_nothing_is_written(
    model: Path,
    tmp_path: Path,
    sample: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = exporter.make_spec

    def wrong(translator: Translator) -> Any:
        spec = plain(translator)
        order = np.arange(len(spec.decoder.projection.weight))
        order[4:] = order[:3:-1]  # the end of a sentence stays, so that translations end
        spec.decoder.projection.weight = spec.decoder.projection.weight[order].copy()
        return spec

    monkeypatch.setattr(exporter, "make_spec", wrong)
    with pytest.raises(SystemExit) as error:
        main([str(model), "--to", "ctranslate2", str(tmp_path / "ct2"), "--sample", str(sample)])
    captured = capsys.readouterr()
    assert error.value.code == 1
    assert captured.out == ""
    assert re.search(
        r"CTranslate2 does not translate like the model: 0 of [1-5] translations? equal", captured.err
    )
    assert re.search(r"ours '.+' \(-[0-9.]+\), CTranslate2's '.*' \(-[0-9.]+\)", captured.err)
    assert not (tmp_path / "ct2").exists()


def test_scores_that_differ_are_a_difference(model: Path, tmp_path: Path) -> None:
    translator = Translator.load(model)
    spec = exporter.make_spec(translator)
    spec.decoder.projection.weight *= 1.01  # the same order of tokens, other probabilities
    exporter._write(spec, tmp_path / "ct2", None)
    agreement = agreement_module.compare(
        translator, ctranslate2.Translator(str(tmp_path / "ct2")), own(translator)
    )
    assert agreement.num_equal == 4
    assert not agreement.is_exact()


@pytest.mark.parametrize(("length", "num_cut"), [(23, 4), (22, 0)])
def test_translations_that_do_not_end_there_are_compared_by_our_scores(
    model: Path, length: int, num_cut: int
) -> None:
    translator = Translator.load(model)
    ours = own(translator)
    assert ours.longest == 23
    token = translator.task.target_vocabulary.tokens[10]
    scores = {x.text: x.hypotheses[0].score for x in ours.translations}

    class Endless:
        """Scores as ours does, and goes on with one token."""

        def translate_batch(self, sources: list[Any], **_: Any) -> list[Any]:
            return [SimpleNamespace(hypotheses=[[token] * length], scores=[0.0]) for _ in sources]

        def score_batch(self, sources: list[Any], targets: list[Any], **_: Any) -> list[Any]:
            return [SimpleNamespace(log_probs=[score]) for score in scores.values()]

    agreement = agreement_module.compare(translator, Endless(), ours)
    assert (agreement.num_cut, len(agreement.faults)) == (num_cut, 4 - num_cut)
    assert agreement.is_exact() == (num_cut == 4)


@pytest.mark.parametrize(
    ("num_sentences", "num_ties", "is_exact"), [(200, 1, True), (200, 2, False), (1000, 2, True)]
)
def test_two_ties_in_a_thousand_are_let_pass(num_sentences: int, num_ties: int, is_exact: bool) -> None:
    agreement = agreement_module.Agreement(num_sentences, num_sentences - num_ties, num_ties, 0.0, 0.0, [])
    assert agreement.is_exact() == is_exact


def test_random_sentences_do_where_there_is_no_sample(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(model), "--to", "ctranslate2", str(tmp_path / "ct2"), "--sample-size", "30"])
    equal = re.search(r"float32: (\d+) of (\d+) translations equal", capsys.readouterr().out)
    assert equal is not None
    assert 0 < int(equal[1]) == int(equal[2])


@pytest.mark.slow
@pytest.mark.skipif(not ORACLE, reason="NMT_FAIRSEQ_ORACLE does not name the folder of fairseq's answers")
def test_a_trained_model_goes_from_fairseq_to_ctranslate2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ORACLE is not None
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    main(["--from", "fairseq", f"{ORACLE}/checkpoint.pt", "--dict-dir", ORACLE, "--to", str(ours)])
    capsys.readouterr()
    main([str(ours), "--to", "ctranslate2", str(theirs), "--sample", f"{ORACLE}/test.en"])
    assert "float32: 200 of 200 translations equal, 0 ties, 0 others" in capsys.readouterr().out


Convert = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Convert:
    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as error:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert (error.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
        return captured.err

    return run


def test_options_of_the_other_direction_are_refused_by_name(fails: Convert) -> None:
    assert "`--dict-dir` must be left out here: it belongs to `nmt-convert --from fairseq" in fails(
        "model", "--to", "ctranslate2", "out", "--dict-dir", "x"
    )
    assert "`--quantization` must be left out here: it belongs to `nmt-convert MODEL_DIR" in fails(
        "--from", "fairseq", "x.pt", "--dict-dir", "x", "--to", "out", "--quantization", "int8"
    )


def test_a_direction_must_be_given(fails: Convert) -> None:
    error = fails("model", "--to", "out")
    assert (
        "must be told the direction: `nmt-convert --from fairseq CHECKPOINT --dict-dir DIR --to MODEL_DIR`"
        in error
    )
    assert "or `nmt-convert MODEL_DIR --to ctranslate2 DIR`" in error


def test_what_is_there_is_not_overwritten(fails: Convert, model: Path, tmp_path: Path) -> None:
    (tmp_path / "ct2").mkdir()
    assert "`to` must be new" in fails(model, "--to", "ctranslate2", tmp_path / "ct2")


def test_a_missing_package_is_named(
    fails: Convert, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    error = fails(model, "--to", "ctranslate2", tmp_path / "ct2")
    assert (
        'CTranslate2 must be installed to convert to it, but is missing. Run pip install "ctranslate2'
        in error
    )


def test_a_token_that_has_two_ids_is_refused(model: Path) -> None:
    translator = Translator.load(model)
    vocabulary = translator.task.target_vocabulary
    last = len(vocabulary) - 1
    tokens = [*vocabulary.tokens[4:-1], vocabulary.tokens[5]]
    translator.task.target_vocabulary = type(vocabulary)(tokens, overwriting={last})
    with pytest.raises(Exception, match="must have each token once for CTranslate2, but that of de has"):
        exporter.make_spec(translator)


def test_models_that_vote_are_refused(model: Path) -> None:
    with pytest.raises(Exception, match="must be one for CTranslate2, but are 2 that vote"):
        exporter.make_spec(Translator.load([model, model]))


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model none of whose translations ends before the limit."""
    folder = write_tiny_model(tmp_path_factory.mktemp("endless") / "model")
    translator = Translator.load(folder)
    (model,) = translator.models
    tensors = {name: tensor.clone() for name, tensor in weights(model).items()}
    tensors["output_weight"][EOS_ID] = -tensors["output_weight"].mean(dim=0) * 50
    endless = folder.with_name("endless")
    write_model_folder(endless, tensors, config=load_config(folder), task=translator.task)
    return endless


def test_translations_that_are_cut_off_are_compared_by_their_scores(
    endless_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(endless_model), "--to", "ctranslate2", str(tmp_path / "ct2"), "--sample-size", "10"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("CTranslate2 translates like the model")
    assert re.match(
        r"float32: no translation ended by itself; [1-9]\d* cut off at the limit, compared by", second
    )


@pytest.mark.parametrize("quantization", [[], ["--quantization", "int8"]])
def test_a_model_that_has_not_learned_to_end_is_compared_by_a_few_lines(
    endless_model: Path,
    tmp_path: Path,
    quantization: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched: list[str] = []
    plain = Translator.translate_lines

    def translate_lines(self: Translator, lines: Any, *arguments: Any, **options: Any) -> Any:
        searched.extend(lines)
        return plain(self, lines, *arguments, **options)

    monkeypatch.setattr(Translator, "translate_lines", translate_lines)
    arguments = ["--to", "ctranslate2", str(tmp_path / "ct2"), "--sample-size", "100", *quantization]
    main([str(endless_model), *arguments])
    assert len(searched) == 10  # once for both comparisons
    _, *compared = capsys.readouterr().out.splitlines()
    assert len(compared) == 1 + bool(quantization)
    for line in compared:
        found = re.search(
            r"; (\d+) cut off at the limit, compared by .* \(left out besides: (\d+) lines\)", line
        )
        assert found is not None
        assert 1 <= int(found[1]) <= 10 and 80 <= int(found[2]) <= 90  # some random ones may be blank


def test_translations_may_be_as_long_as_by_default(model: Path) -> None:
    translator = Translator.load(model)
    num_pieces = [len(ids) for ids in translator.source_segmenter.encode(["A dog runs.", "Two dogs run."])]
    assert own(translator, "A dog runs.", "Two dogs run.").longest == min(2 * max(num_pieces) + 10, 23)


def test_a_difference_shows_where_no_translation_ends(endless_model: Path, tmp_path: Path) -> None:
    translator = Translator.load(endless_model)
    spec = exporter.make_spec(translator)
    spec.decoder.projection.weight *= 1.1
    exporter._write(spec, tmp_path / "ct2", None)
    agreement = compare(translator, tmp_path / "ct2", "the dog", "a cat")
    assert (agreement.num_sentences, agreement.num_cut) == (0, 2)
    assert not agreement.is_exact()


def test_a_quantised_model_that_translates_all_otherwise_does_not_pass(model: Path, tmp_path: Path) -> None:
    """The mean difference is of all sentences, not of those alone that came out equal."""
    translator = Translator.load(model)
    spec = exporter.make_spec(translator)
    spec.decoder.projection.weight = spec.decoder.projection.weight[::-1].copy()
    exporter._write(spec, tmp_path / "ct2", "int8")
    agreement = agreement_module.compare(
        translator, ctranslate2.Translator(str(tmp_path / "ct2")), own(translator)
    )
    assert agreement.num_equal == 0
    assert agreement.mean_difference > 1


def test_a_sample_without_a_piece_to_translate_is_refused(
    model: Path, tmp_path: Path, fails: Convert
) -> None:
    (tmp_path / "blank").write_text("\u00ad\n\u0085\n")
    arguments = (model, "--to", "ctranslate2", tmp_path / "out", "--sample", tmp_path / "blank")
    assert "`sample` must have lines to translate, but is blank." in fails(*arguments)
    with pytest.raises(UserError, match="`sample` must have lines that the model can translate"):
        own(Translator.load(model), "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_part_that_ctranslate2_does_not_have_is_named(model: Path, stack: str) -> None:
    translator = Translator.load(model)
    layer = getattr(translator.models[0], stack).layers[0]
    layer.around_feed_forward.norm = torch.nn.RMSNorm(16)
    with pytest.raises(
        UserError, match=rf"cannot hold `{stack}\.layers\.0\.around_feed_forward\.norm`, .*RMSNorm"
    ):
        exporter.make_spec(translator)
