"""Pairs to ids: against a plain reference, and the same for any number of workers."""

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nmt.data.binarize import BlockEncoder, SplitFiles, SplitReport, binarize
from nmt.data.indexed_dataset import IndexedDataset
from nmt.data.pair_blocks import read_blocks
from nmt.data.segmenter import Segmenter, read_vocabulary, train_segmenter
from nmt.data.vocabulary import EOS_ID
from nmt.errors import UserError

MAX_LENGTH = 12


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    path = tmp_path_factory.mktemp("binarize") / "sentencepiece.model"
    text = ["a bad lad had a sad dad", "salad had a bald lad", "all dads laid a slab"] * 5
    train_segmenter(text, path, vocab_size=290, model_type="bpe", character_coverage=1.0)
    return Segmenter(path, read_vocabulary(path))


def run(
    folder: Path,
    segmenter: Segmenter,
    source: bytes,
    target: bytes,
    *,
    num_workers: int = 1,
    block_bytes: int = 100,
) -> SplitReport:
    folder.mkdir(exist_ok=True)
    (folder / "in.source").write_bytes(source)
    (folder / "in.target").write_bytes(target)
    paths = (folder / "in.source", folder / "in.target")
    return binarize(
        read_blocks(*paths, block_bytes=block_bytes),
        BlockEncoder(segmenter, *paths, max_length=MAX_LENGTH, keep_text=True),
        SplitFiles(folder / "source", folder / "target", folder / "source.txt", folder / "target.txt"),
        num_workers=num_workers,
    )


def reference(
    segmenter: Segmenter, source: list[str], target: list[str]
) -> tuple[list[tuple[list[int], list[int]]], dict[str, int], list[tuple[str, str]]]:
    pairs, kept, dropped = [], [], {"empty": 0, "too_long": 0}
    for raw in zip(source, target, strict=True):
        pair = tuple([*segmenter.encode([line])[0].tolist(), EOS_ID] for line in raw)
        if min(map(len, pair)) == 1 or not all(line.strip() for line in raw):
            dropped["empty"] += 1
        elif max(map(len, pair)) > MAX_LENGTH:
            dropped["too_long"] += 1
        else:
            pairs.append(pair)
            kept.append(raw)
    return pairs, dropped, kept


_line = st.lists(
    st.sampled_from(
        ["a", "dad", "salad", "☃", " ", "\r", "\u2028", "\x00", "\u200b", "\u3000", "\x85", "\xad"]
    ),
    max_size=7,
)
_lines = st.lists(st.tuples(_line.map(" ".join), _line.map("".join)), min_size=1, max_size=25)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=_lines, block_bytes=st.integers(2, 200))
def test_binarised_pairs_are_the_references(
    tmp_path_factory: pytest.TempPathFactory,
    segmenter: Segmenter,
    pairs: list[tuple[str, str]],
    block_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    source, target = ([pair[side] for pair in pairs] for side in (0, 1))
    raw = ["".join(line + "\n" for line in side).encode() for side in (source, target)]
    report = run(folder, segmenter, *raw, block_bytes=block_bytes)
    expected, dropped, kept = reference(segmenter, source, target)
    datasets = [IndexedDataset(folder / side) for side in ("source", "target")]
    assert [tuple(data[i].tolist() for data in datasets) for i in range(len(datasets[0]))] == expected
    assert report.dropped == dropped
    assert (report.num_read, report.num_pairs) == (len(pairs), len(expected))
    for index, (side, side_report) in enumerate([("source", report.source), ("target", report.target)]):
        tokens = [token for pair in expected for token in pair[index]]
        assert side_report.num_tokens == len(tokens)
        assert side_report.counts.tolist() == [tokens.count(i) for i in range(len(segmenter.vocabulary))]
        assert side_report.num_bytes == sum(bool(segmenter.is_byte[token]) for token in tokens)
        text = (folder / f"{side}.txt").read_bytes()
        assert text == "".join(pair[index].rstrip("\r") + "\n" for pair in kept).encode()


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, segmenter: Segmenter) -> None:
    choose = random.Random(1)
    words = ["a", "dad", "salad", "bald", "", " ", "slabs"]
    source, target = (
        "".join(" ".join(choose.choices(words, k=choose.randint(0, 9))) + "\n" for _ in range(300)).encode()
        for _ in range(2)
    )
    contents = []
    for num_workers in (1, 3):
        folder = tmp_path / str(num_workers)
        report = run(folder, segmenter, source, target, num_workers=num_workers, block_bytes=200)
        assert report.num_read == 300
        assert 0 < report.num_pairs < 300
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_error_of_a_worker_names_file_and_line(
    tmp_path: Path, segmenter: Segmenter, num_workers: int
) -> None:
    good = b"a bad dad\n" * 30
    with pytest.raises(UserError, match=r"in\.target, line 31:"):
        run(tmp_path, segmenter, good + b"a\n" * 9, good + b"\xff\n" + b"a\n" * 8, num_workers=num_workers)
    assert not (tmp_path / "source.bin").exists()
    assert not (tmp_path / "source.idx").exists()


def test_progress_counts_every_pair(tmp_path: Path, segmenter: Segmenter) -> None:
    seen: list[int] = []
    for side in ("source", "target"):
        (tmp_path / side).write_bytes(b"a dad\n" * 50 + b"\n")
    binarize(
        read_blocks(tmp_path / "source", tmp_path / "target", block_bytes=100),
        BlockEncoder(segmenter, tmp_path / "source", tmp_path / "target", max_length=MAX_LENGTH),
        SplitFiles(tmp_path / "out.source", tmp_path / "out.target"),
        progress=seen.append,
    )
    assert len(seen) > 3
    assert sum(seen) == 51
