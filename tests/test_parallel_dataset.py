"""Tests of pairs of sentences and their padded batches."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.in_memory import Side, numbered_pairs

from nmt.data.batch_iterator import BatchIterator
from nmt.data.options import BatchingOptions
from nmt.data.parallel_dataset import ParallelDataset, TranslationBatch, collate_pairs
from nmt.data.vocabulary import EOS_ID, PAD_ID
from nmt.errors import UserError


def side(sentences, dtype=np.uint16):
    """Return sentences in memory, each with its end."""
    return Side([np.array([*sentence, EOS_ID], dtype=dtype) for sentence in sentences])


sentences = st.lists(st.integers(3, 2**16 - 1), max_size=9)
pairs = st.lists(st.tuples(sentences, sentences), min_size=1, max_size=8)


def test_a_batch_by_hand():
    dataset = ParallelDataset(side([[5, 6], [7]]), side([[8], [9, 10, 11]]))
    batch = dataset.collate([dataset[0], dataset[1]])
    assert batch.source.tolist() == [[5, 6, EOS_ID], [7, EOS_ID, PAD_ID]]
    assert batch.target.tolist() == [[8, EOS_ID, PAD_ID, PAD_ID], [9, 10, 11, EOS_ID]]
    assert batch.target_input.tolist() == [[EOS_ID, 8, PAD_ID, PAD_ID], [EOS_ID, 9, 10, 11]]
    assert (batch.num_examples, batch.num_targets) == (2, 6)
    assert {batch.source.dtype, batch.target.dtype, batch.target_input.dtype} == {torch.int64}
    assert dataset.sizes[:].tolist() == [[3, 2], [2, 4]]
    assert dataset.sizes[:].dtype == np.int32


@settings(deadline=None)
@given(pairs=pairs, dtype=st.sampled_from([np.uint16, np.int32, np.int64]))
def test_collating_equals_padding_token_by_token(pairs, dtype):
    dataset = ParallelDataset(side([s for s, _ in pairs], dtype), side([t for _, t in pairs], dtype))
    batch = collate_pairs([dataset[i] for i in range(len(dataset))])

    def padded(rows):
        longest = max(map(len, rows))
        return [row + [PAD_ID] * (longest - len(row)) for row in rows]

    assert batch.source.tolist() == padded([[*source, EOS_ID] for source, _ in pairs])
    assert batch.target.tolist() == padded([[*target, EOS_ID] for _, target in pairs])
    assert batch.target_input.tolist() == padded([[EOS_ID, *target] for _, target in pairs])
    assert batch.num_examples == len(pairs)
    assert batch.num_targets == sum(len(target) + 1 for _, target in pairs)


def test_a_padding_id_inside_a_sentence_is_a_token_like_any_other():
    dataset = ParallelDataset(side([[5]]), side([[8, PAD_ID, 9]]))
    batch = dataset.collate([dataset[0]])
    assert batch.target_input.tolist() == [[EOS_ID, 8, PAD_ID, 9]]
    assert batch.num_targets == 4


def test_a_batch_moves_to_a_device_as_a_whole():
    dataset = ParallelDataset(side([[5]]), side([[6]]))
    batch = dataset.collate([dataset[0]]).to(torch.device("meta"))
    assert isinstance(batch, TranslationBatch)
    assert all(t.device.type == "meta" for t in (batch.source, batch.target, batch.target_input))
    assert (batch.num_examples, batch.num_targets) == (1, 2)


def test_sides_of_different_length_are_refused_with_both_numbers():
    with pytest.raises(UserError, match="source has 2 and the target 1"):
        ParallelDataset(side([[5], [6]]), side([[5]]))


def test_pickling_carries_the_two_sides_and_not_the_sizes():
    dataset = ParallelDataset(side([[5], [6, 7]]), side([[8], [9]]))
    without_sizes = pickle.dumps(dataset)
    assert dataset.sizes.shape == (2, 2)
    assert pickle.dumps(dataset) == without_sizes
    assert pickle.loads(without_sizes).sizes[:].tolist() == dataset.sizes[:].tolist()


def test_an_empty_split_has_sizes():
    assert ParallelDataset(side([]), side([])).sizes.shape == (0, 2)


def test_worker_processes_make_the_same_tensors():
    random = np.random.default_rng(0)
    lines = [random.integers(4, 100, random.integers(1, 20)).tolist() for _ in range(200)]
    dataset = ParallelDataset(side(lines), side(lines[::-1]))
    options = BatchingOptions(max_tokens=200)
    expected = [update[0].batch for update in BatchIterator(dataset, options, seed=1)]
    with BatchIterator(dataset, options, seed=1, num_workers=2) as batches:
        made = [update[0].batch for update in batches]
    assert len(made) == len(expected) > 20
    for one, other in zip(made, expected, strict=True):
        assert torch.equal(one.source, other.source)
        assert torch.equal(one.target, other.target)
        assert torch.equal(one.target_input, other.target_input)
        assert (one.num_examples, one.num_targets) == (other.num_examples, other.num_targets)


def test_workers_end_with_the_iterator_whoever_still_holds_what_they_read():
    batches = BatchIterator(numbered_pairs(), BatchingOptions(max_tokens=64), seed=1, num_workers=2)
    iteration = iter(batches)
    next(iteration)
    assert batches._loader is not None
    held = batches._loader._iterator  # as the frames of an exception may
    workers = held._workers
    assert all(worker.is_alive() for worker in workers)
    batches.close()
    assert not any(worker.is_alive() for worker in workers)


PROGRAM = """
from support.in_memory import numbered_pairs

from nmt.data.batch_iterator import BatchIterator
from nmt.data.options import BatchingOptions

if __name__ == "__main__":
    batches = BatchIterator(numbered_pairs(), BatchingOptions(max_tokens=64), seed=1, num_workers=1)
    iteration = iter(batches)
    next(iteration)
    held = batches._loader._iterator
    raise SystemExit(7)
"""


def test_a_process_ends_whose_workers_nobody_has_ended(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
        check=False,
    )
    assert result.returncode == 7
