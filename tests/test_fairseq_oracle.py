"""The same hypotheses and scores as fairseq's, from fairseq's weights.

The folder of fairseq's answers is named by the environment variable NMT_FAIRSEQ_ORACLE. It holds a checkpoint,
dictionaries, 200 sentences in pieces, and for each setting a table: id, rank, score, hypothesis, token scores.

fairseq is wrong in these places, so its answers there are not compared:
- `--no-repeat-ngram-size` does nothing on the CPU; the answers of a corrected fairseq are taken (`_fixed`).
- Diverse beam search crashes or extends finished hypotheses; there is none here.
- A length limit depends on the other sentences of the batch; its answers for one sentence at a time are taken.
"""

import csv
import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from nmt.checkpoints.model_folder import load_model
from nmt.cli.convert import main as convert
from nmt.cli.generate import main as generate
from nmt.models.transformer import Transformer

ORACLE = os.environ.get("NMT_FAIRSEQ_ORACLE")
pytestmark = [
    pytest.mark.skipif(not ORACLE, reason="NMT_FAIRSEQ_ORACLE does not name the folder of fairseq's answers"),
    pytest.mark.slow,
]

# fairseq's own default limit; ours is 2 x source + 10.
LIMIT = ("--max-len-a", "0", "--max-len-b", "200")

SETTINGS = {
    "beam1": ("--beam", "1", *LIMIT),
    "beam5": ("--beam", "5", *LIMIT),
    "beam10": ("--beam", "10", *LIMIT),
    "beam5_lenpen0.6": ("--beam", "5", "--lenpen", "0.6", *LIMIT),
    "beam5_lenpen1.5": ("--beam", "5", "--lenpen", "1.5", *LIMIT),
    "beam5_nbest5": ("--beam", "5", "--nbest", "5", *LIMIT),
    "beam5_minlen10": ("--beam", "5", "--min-len", "10", *LIMIT),
    "beam5_maxlen_bs1": ("--beam", "5", "--max-len-a", "0.5", "--max-len-b", "5"),
    "beam5_unkpen2": ("--beam", "5", "--unkpen", "2", *LIMIT),
    "beam5_unkpen-2": ("--beam", "5", "--unkpen", "-2", *LIMIT),
    "beam5_prefix2": ("--beam", "5", "--prefix-size", "2", *LIMIT),
    "beam5_unnormalized": ("--beam", "5", "--unnormalized", *LIMIT),
    "beam5_temp1.3": ("--beam", "5", "--temperature", "1.3", *LIMIT),
    "beam5_norepeat2_fixed": ("--beam", "5", "--no-repeat-ngram-size", "2", *LIMIT),
    "score_reference": ("--score-reference",),
}
ENSEMBLE_SETTINGS = ("beam1", "beam5", "beam5_nbest5", "beam5_lenpen0.6", "beam5_prefix2", "score_reference")

SCORE_TOLERANCE, TOKEN_TOLERANCE = 1e-4, 1e-3
TIE = 1e-5  # totals nearer than this may change places: they differ by rounding alone


class Answer(NamedTuple):
    score: float
    hypothesis: str
    token_scores: list[float]


@pytest.fixture(scope="module")
def oracle() -> Path:
    return Path(ORACLE or "")


@pytest.fixture(scope="module")
def model(one_thread: None, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(oracle / "checkpoint.pt", oracle, tmp_path_factory.mktemp("converted") / "model")


@pytest.fixture(scope="module")
def early_model(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = oracle / "ensemble" / "checkpoint_early.pt"
    return converted(checkpoint, oracle, tmp_path_factory.mktemp("converted") / "early")


def converted(checkpoint: Path, dictionaries: Path, folder: Path) -> Path:
    convert(["--from", "fairseq", str(checkpoint), "--dict-dir", str(dictionaries), "--to", str(folder)])
    return folder


def our_answers(
    model: str, oracle: Path, output: Path, arguments: tuple[str, ...]
) -> dict[int, list[Answer]]:
    """Run nmt-generate and read the lines that it prints."""
    texts = ["--input", str(oracle / "test.en"), "--reference", str(oracle / "test.de"), "--input-is-pieces"]
    generate(
        [
            "--model",
            model,
            *texts,
            "--format",
            "fairseq",
            "--device",
            "cpu",
            "--output",
            str(output),
            *arguments,
        ]
    )
    answers: dict[int, list[Answer]] = {}
    for line in output.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        kind, number = line.split("\t", 1)[0].split("-")
        columns = line.split("\t")[1:]
        if kind == "H":
            hypothesis = (float(columns[0]), columns[1])
        elif kind == "D":
            assert (float(columns[0]), columns[1]) == hypothesis  # there is nothing to detokenise
        elif kind == "P":
            token_scores = [float(x) for x in columns[0].split(" ")]
            answers.setdefault(int(number), []).append(Answer(*hypothesis, token_scores))
    return answers


def their_answers(path: Path) -> dict[int, list[Answer]]:
    answers: dict[int, list[Answer]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            token_scores = [float(x) for x in row["token_scores"].split(" ")]
            found = answers.setdefault(int(row["id"]), [])
            assert int(row["rank"]) == len(found)
            found.append(Answer(float(row["score"]), row["hypothesis"], token_scores))
    return answers


def assert_same_answers(ours: dict[int, list[Answer]], theirs: dict[int, list[Answer]]) -> None:
    assert ours.keys() == theirs.keys()
    for number, expected in theirs.items():
        assert len(ours[number]) == len(expected), number
        for rank, (mine, other) in enumerate(zip(ours[number], expected, strict=True)):
            where = f"sentence {number}, rank {rank}"
            assert mine.score == pytest.approx(other.score, abs=SCORE_TOLERANCE), where
            if mine.hypothesis == other.hypothesis:
                assert mine.token_scores == pytest.approx(other.token_scores, abs=TOKEN_TOLERANCE), where
            else:
                assert abs(mine.score - other.score) < TIE, where
                tied = [x.hypothesis for x in expected if abs(x.score - other.score) < TIE]
                assert mine.hypothesis in tied or rank == len(expected) - 1, where


@pytest.mark.parametrize("name", SETTINGS)
def test_one_model_answers_as_fairseq_does(name: str, model: Path, oracle: Path, tmp_path: Path) -> None:
    ours = our_answers(str(model), oracle, tmp_path / "output", SETTINGS[name])
    assert_same_answers(ours, their_answers(oracle / "out" / f"{name}.tsv"))


@pytest.mark.parametrize("name", ENSEMBLE_SETTINGS)
def test_an_ensemble_answers_as_fairseq_does(
    name: str, model: Path, early_model: Path, oracle: Path, tmp_path: Path
) -> None:
    ours = our_answers(f"{model}:{early_model}", oracle, tmp_path / "output", SETTINGS[name])
    assert_same_answers(ours, their_answers(oracle / "ensemble" / "out" / f"{name}.tsv"))


def test_sources_and_references_are_printed_as_fairseq_prints_them(
    model: Path, oracle: Path, tmp_path: Path
) -> None:
    our_answers(str(model), oracle, tmp_path / "output", ("--score-reference",))

    def texts(path: Path) -> set[str]:
        return {line for line in path.read_text(encoding="utf-8").split("\n") if line[:2] in ("S-", "T-")}

    for name in ("beam5", "beam5_nbest5", "beam5_prefix2", "score_reference"):
        assert texts(tmp_path / "output") == texts(oracle / "out" / f"{name}.out")


def test_no_translation_repeats_a_pair_of_tokens_where_that_is_forbidden(
    model: Path, oracle: Path, tmp_path: Path
) -> None:
    ours = our_answers(str(model), oracle, tmp_path / "output", SETTINGS["beam5_norepeat2_fixed"])
    for (answer,) in ours.values():
        tokens = answer.hypothesis.split(" ")
        pairs = list(itertools.pairwise(tokens))
        assert len(set(pairs)) == len(pairs)


def test_log_probabilities_in_full_precision(model: Path, oracle: Path) -> None:
    transformer, _ = load_model(model)
    assert isinstance(transformer, Transformer)
    for sentence in json.loads((oracle / "forced.json").read_text(encoding="utf-8"))["sentences"]:
        source = torch.tensor([sentence["source_ids"]])
        target = torch.tensor([sentence["target_ids"]])
        target_input = torch.cat([torch.tensor([[2]]), target[:, :-1]], dim=1)
        with torch.inference_mode():
            encoded = transformer.encoder(source, source == 1)
            logits = transformer.decode(target_input, transformer.encode(source))
        log_probs = logits.log_softmax(dim=-1).gather(2, target[:, :, None]).flatten()
        assert encoded[0, 0, :8].tolist() == pytest.approx(
            sentence["encoder_out"]["first_position_first8"], abs=1e-5
        )
        assert logits[0, 0, :8].tolist() == pytest.approx(sentence["logits_step0"]["first8"], abs=1e-5)
        np.testing.assert_allclose(log_probs.numpy(), sentence["logprob_ln"], atol=2e-5)
