"""The token store: fairseq's bytes, views that stay valid, damage that is named."""

import gc
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, smallest_dtype
from nmt.data.vocabulary import EOS_ID, UNK_ID
from nmt.errors import UserError

UINT16 = np.dtype(np.uint16)


def write(prefix: Path, sequences: list[list[int]], dtype: np.dtype = UINT16) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for sequence in sequences:
            writer.add(np.array(sequence, dtype=dtype))
    return prefix


def fairseq_index(sizes: list[int], *, code: int, itemsize: int) -> bytes:
    """The layout as the reference describes it."""
    offsets = [itemsize * sum(sizes[:i]) for i in range(len(sizes))]
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQ", 1, code, len(sizes))
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(sizes)}q", *offsets)
    )


def test_files_are_fairseqs_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "a", [[7, 8, 2], [2], [65535, 2]])
    assert (tmp_path / "a.idx").read_bytes() == fairseq_index([3, 1, 2], code=8, itemsize=2)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<6H", 7, 8, 2, 2, 65535, 2)
    write(tmp_path / "b", [[70000, 2]], np.dtype(np.int32))
    assert (tmp_path / "b.idx").read_bytes() == fairseq_index([2], code=4, itemsize=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "b.bin", "b.idx"]


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(1, "u1"), (2, "i1"), (3, "i2"), (4, "i4"), (5, "i8"), (8, "u2"), (9, "u4"), (10, "u8")],
)
def test_every_integer_type_of_fairseq_is_read(tmp_path: Path, code: int, dtype: str) -> None:
    ids = np.array([5, 6, 2, 9, 2], dtype=f"<{dtype}")
    (tmp_path / "a.bin").write_bytes(ids.tobytes())
    (tmp_path / "a.idx").write_bytes(fairseq_index([3, 2], code=code, itemsize=ids.itemsize))
    dataset = IndexedDataset(tmp_path / "a")
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[5, 6, 2], [9, 2]]
    assert dataset.dtype == ids.dtype


_sequences = st.lists(st.lists(st.integers(0, 65535), max_size=6), max_size=20)


@given(first=_sequences, second=_sequences)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, first: list[list[int]], second: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("dataset")
    with IndexedDatasetWriter(folder / "both", UINT16) as writer:
        flat = np.array([token for sequence in first for token in sequence], dtype=np.int64)
        writer.add_many(flat, np.array([len(sequence) for sequence in first], dtype=np.int64))
        for sequence in second:
            writer.add(np.array(sequence, dtype=np.int64))
    dataset = IndexedDataset(folder / "both")
    assert len(dataset) == len(first) + len(second)
    assert [dataset[i].tolist() for i in range(len(dataset))] == first + second
    assert dataset.sizes.tolist() == [len(sequence) for sequence in first + second]
    assert dataset.sizes.dtype == np.int32


def test_views_outlive_the_dataset(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "a", [list(range(100)), [5, 2]]))
    first, sizes = dataset[0], dataset.sizes
    del dataset
    gc.collect()
    assert first.tolist() == list(range(100))
    assert sizes.tolist() == [100, 2]
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


def test_pickle_is_the_path_only(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "a", [[1] * 5000 + [2]]))
    assert len(dataset) == 1
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 500
    assert pickle.loads(pickled)[0].tolist() == dataset[0].tolist()


def test_index_beyond_the_end_is_an_index_error(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "a", [[5, 2]]))
    assert dataset[-1].tolist() == [5, 2]
    with pytest.raises(IndexError):
        dataset[1]


def test_nothing_is_left_of_a_dataset_that_failed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "a", UINT16) as writer:
        writer.add(np.array([1, 2]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_megatrons_variant_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a", [[5, 2], [2]])
    with (tmp_path / "a.idx").open("ab") as file:
        file.write(struct.pack("<3q", 0, 1, 2))
    with pytest.raises(UserError, match="Megatron"):
        len(IndexedDataset(tmp_path / "a"))


@pytest.mark.parametrize("name", ["a.idx", "a.bin"])
def test_file_cut_anywhere_is_named_with_its_sizes(tmp_path: Path, name: str) -> None:
    whole = (write(tmp_path / "a", [[5, 6, 2], [2]]).parent / name).read_bytes()
    for size in range(len(whole)):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"{name} (.*has {size}\b|must be an index)"):
            len(IndexedDataset(tmp_path / "a"))


def test_bin_of_another_index_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[5, 6, 2], [2]])
    (tmp_path / "a.bin").write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"a\.bin does not belong to its index.*8 bytes.*has 100"):
        IndexedDataset(tmp_path / "a")[0]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"TNTIDX\x00\x00" + bytes(50), "fairseq's old"),
        (b"something else, and long enough", "must be an index"),
        (b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 2, 8, 0), "version 1, but is of version 2"),
        (b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, 7, 0), "must hold integers"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, header: bytes, message: str) -> None:
    (tmp_path / "a.idx").write_bytes(header)
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        len(IndexedDataset(tmp_path / "a"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.idx"):
        len(IndexedDataset(tmp_path / "a"))


def test_smallest_dtype_holds_every_id() -> None:
    assert smallest_dtype(65_535) == np.uint16
    assert smallest_dtype(65_536) == np.int32


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8"])
def test_an_id_beyond_the_dictionary_is_named(tmp_path: Path, dtype: str) -> None:
    data = IndexedDataset(write(tmp_path / "a", [[7, 2], [2], [9, 8, 2]], np.dtype(dtype)))
    data.check_ids(10, Path("dict.en.txt"))
    with pytest.raises(
        UserError, match=r"a\.bin .* from 0 to 8, since dict\.en\.txt .* sequence 2 .* has the id 9\."
    ):
        data.check_ids(9, Path("dict.en.txt"))


@pytest.mark.parametrize("number", [0, 3, 6_553, 13_106, 30_000, 39_998])
def test_an_id_beyond_the_dictionary_is_found_wherever_it_stands(tmp_path: Path, number: int) -> None:
    """Sequences of 10 ids, each but the first with one after it that has none."""
    sizes = np.array([10, *[10, 0] * 20_000], dtype=np.int64)
    ids = np.full(sizes.sum(), 5)
    ids[[int(sizes[: number + 1].sum()) - 1, -1]] = 9  # the last one of its sequence; another at the end
    with IndexedDatasetWriter(tmp_path / "a", UINT16) as writer:
        writer.add_many(ids, sizes)
    expected = number if sizes[number] else number - 1
    with pytest.raises(UserError, match=rf"sequence {expected:,} \(from 0\) has the id 9\."):
        IndexedDataset(tmp_path / "a").check_ids(9, Path("dict.en.txt"))


def test_a_negative_id_is_named(tmp_path: Path) -> None:
    data = IndexedDataset(write(tmp_path / "a", [[7, 2], [-1, 2]], np.dtype("<i4")))
    with pytest.raises(UserError, match=r"sequence 1 \(from 0\) has the id -1"):
        data.check_ids(10, Path("dict.en.txt"))
    IndexedDataset(write(tmp_path / "empty", [])).check_ids(4, Path("dict.en.txt"))


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=20))
@settings(deadline=None)
def test_unknown_tokens_and_special_symbols_within_sequences_are_counted(
    tmp_path_factory: pytest.TempPathFactory, sequences: list[list[int]]
) -> None:
    prefix = write(tmp_path_factory.mktemp("data") / "a", sequences)
    within = sum(token <= EOS_ID for sequence in sequences for token in sequence[:-1])
    without_end = sum(sequence[-1:] != [EOS_ID] for sequence in sequences)
    pieces = sum(map(len, sequences)) - len(sequences)
    unknown = sum(token == UNK_ID for sequence in sequences for token in sequence)
    assert IndexedDataset(prefix).count_oddities() == (unknown / max(pieces, 1), within, without_end)
