"""Validation and test pairs that are longer than the model takes: cut for the loss, translated whole, counted."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.in_memory import Side
from support.tiny_translation_model import MAX_POSITIONS, WORDS
from support.toy_run import log

from nmt.cli.preprocess import main as preprocess
from nmt.cli.train import main as train
from nmt.cli.validate import main as validate
from nmt.data.parallel_dataset import ParallelDataset, cut_pair
from nmt.data.vocabulary import EOS_ID
from nmt.distributed import single
from nmt.translation.held_out import source_parts
from nmt.translation.translator import Translator

CPU = torch.device("cpu")
LONG = ". ".join(" ".join(WORDS[i : i + 4]) for i in range(8)) + "."  # far more than MAX_POSITIONS pieces
LINES = ["the dog runs", LONG, "a big cat sleeps", f"{LONG} {LONG}"]


def ids_of(*numbers: int) -> np.ndarray:
    return np.array([*numbers, EOS_ID])


def pairs(translator: Translator, positions: tuple[int, int] | None) -> ParallelDataset:
    encoded = [np.append(ids, EOS_ID) for ids in translator.task.source_segmenter.encode(LINES)]
    return ParallelDataset(Side(encoded), Side(encoded), positions=positions)


def test_a_pair_is_cut_to_the_positions_of_each_side_by_hand() -> None:
    source, target = cut_pair((ids_of(4, 5, 6, 7), ids_of(8, 9, 10)), (3, 2))
    assert source.tolist() == [4, 5, EOS_ID]  # a source that the encoder takes for whole
    assert target.tolist() == [8, 9]  # whose end is not to be predicted here
    assert [side.tolist() for side in cut_pair((ids_of(4), ids_of(8)), (2, 2))] == [[4, EOS_ID], [8, EOS_ID]]


SENTENCE = st.lists(st.integers(4, 99), max_size=12).map(lambda numbers: ids_of(*numbers))


@given(st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=6), st.integers(2, 9), st.integers(1, 9))
def test_batches_have_what_fits_and_items_all(
    given_pairs: list[tuple[Any, Any]], source: int, target: int
) -> None:
    sides = [Side([pair[side] for pair in given_pairs]) for side in (0, 1)]
    whole = ParallelDataset(*sides)
    cut = pickle.loads(pickle.dumps(ParallelDataset(*sides, split="valid", positions=(source, target))))
    items = [cut[index] for index in range(len(cut))]
    assert [[side.tolist() for side in item] for item in items] == [
        [side.tolist() for side in whole[index]] for index in range(len(whole))
    ]
    batch = cut.collate(items)
    lengths = whole.sizes[:].tolist()
    assert cut.sizes[:].tolist() == [[min(a, source), min(b, target)] for a, b in lengths]
    assert batch.num_targets == sum(min(b, target) for _, b in lengths)
    assert batch.source.shape[1] <= source and batch.target.shape[1] <= target
    assert cut.num_cut == sum(a > source or b > target for a, b in lengths)
    assert bool(cut.notes()) == (cut.num_cut > 0) and whole.notes() == []


def test_validation_translates_long_sources_as_the_translator_does(
    translator: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model = translator.task, translator.models[0]
    monkeypatch.setitem(vars(task), "_data_directory", SimpleNamespace(has_raw_text=False))
    examples = pairs(translator, (MAX_POSITIONS, MAX_POSITIONS))
    assert examples.num_cut == 2
    found = task._translate(model, examples, range(4), single(CPU))
    assert [found[index] for index in range(4)] == translator.translate(LINES)
    assert set(task.evaluate(model, examples, single(CPU))) == {"bleu", "chrf"}
    assert len(task.illustrate(model, examples, single(CPU)).texts["translations"].splitlines()) == 6


def test_parts_of_a_source_hold_all_of_it(translator: Translator) -> None:
    segmenter = translator.task.source_segmenter
    ids = np.append(segmenter.encode([LONG])[0], EOS_ID)
    parts = source_parts(ids, segmenter, longest=MAX_POSITIONS, text=lambda: LONG)
    assert len(parts) > 1 and all(len(part) <= MAX_POSITIONS and part[-1] == EOS_ID for part in parts)
    assert " ".join(segmenter.decode(parts)).split() == segmenter.decode([ids])[0].split()


def test_remarks_show_samples_and_where_to_look_while_bleu_tells_nothing(translator: Translator) -> None:
    task, model, examples = translator.task, translator.models[0], pairs(translator, (MAX_POSITIONS,) * 2)
    remarks = task.remarks(model, examples, {"bleu": 0.99, "chrf": 12.34}, single(CPU))
    assert remarks[-1] == "BLEU is below 1 and tells little: chrF is the number to look at, 12.3 here"
    samples = remarks[:-1]
    assert [line.split(" | ")[0] for line in samples] == [
        "sample, line 1",
        "sample, line 2",
        "sample, line 4",
    ]
    translation = translator.translate([LINES[0]])[0]
    assert samples[0] == f"sample, line 1 | {LINES[0]} | wanted: {LINES[0]} | model: {translation}"
    assert all(len(line) < 700 for line in samples)
    assert task.remarks(model, examples, {"bleu": 1.0, "chrf": 12.34}, single(CPU)) == samples


def test_samples_send_nothing_to_a_terminal_but_text() -> None:
    from nmt.translation.held_out import sample_lines

    (line,) = sample_lines(["a\x1b[31mb"], ["c\rd"], {0: "e\u202ef\n"}, [0])
    assert line == "sample, line 1 | a\\x1b[31mb | wanted: c\\rd | model: e\\u202ef\\n"


def write_text(folder: Path) -> None:
    """Short pairs, and in the validation and test sets one that is long."""
    lines = [" ".join(WORDS[i % 11 : i % 11 + 2 + i % 3]) for i in range(60)]
    long = " ".join(WORDS * 4)
    for name, own in (("train", lines), ("valid", [*lines[:5], long]), ("test", [*lines[5:9], long])):
        for lang in ("en", "de"):
            (folder / f"{name}.{lang}").write_text("".join(line + "\n" for line in own))


def test_a_run_keeps_counts_and_scores_pairs_beyond_its_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path)
    languages = ["--source-lang", "en", "--target-lang", "de"]
    prefixes = [x for name in ("train", "valid", "test") for x in (f"--{name}pref", str(tmp_path / name))]
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    preprocess([*languages, *prefixes, "--destdir", data, "--vocab-size", "330", "--max-length", "20"])
    size = [
        x for side in ("encoder", "decoder") for x in (f"--{side}-layers", "1", f"--{side}-embed-dim", "16")
    ]
    size += ["--max-source-positions", "24", "--max-target-positions", "24"]
    options = ["--max-tokens", "200", "--warmup-updates", "2", "--max-update", "3", "--eval-beam", "1"]
    train([data, "--save-dir", run, "--arch", "transformer_tiny", "--device", "cpu", *size, *options])
    said = log(tmp_path / "run")
    assert "valid: 1 of 6 pairs is longer than the positions of the model (24 and 24): the loss is of" in said
    assert " | bleu " in said and " | chrf " in said and "sample, line 6 | " in said
    assert f"next: nmt-generate --model {run}/checkpoints/best --input FILE.en" in said
    capsys.readouterr()
    validate([f"{run}/checkpoints/best", "--split", "test"])
    printed = capsys.readouterr()
    assert '"chrf": ' in printed.out and "test: 1 of 5 pairs is longer" in printed.err
