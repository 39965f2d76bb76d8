#!/usr/bin/env python
"""Simulate the batches of a huge corpus, without training: what start-up, a seek and a rank's memory cost.

    scripts/bench/iterator.py [--pairs 100000000] [--ranks 1 8 64] [--max-tokens 4096] [--folder DIR]

A corpus of random lengths is written, 24 bytes a pair, to a folder of its own in DIR (or where temporary files
go), which is deleted at the end. Its ids are holes in a file, which take no room. What is measured is the path of
a training: data directory -> IndexedDataset -> ParallelDataset -> BatchIterator. Of each number of ranks the last
one is run, alone and in a process of its own: ranks plan apart from each other, so the others take as long.

  open      the lengths of both sides are checked, and the longest is found: once in each process
  survey    one pass over all lengths: what is left out, how many tokens
  first     from there to the first update, read and collated
  seek      from a saved position in the middle of an epoch to its first update
  window    planning one more window, which each rank does for itself
  a window  updates in it: the more ranks, the sooner the next one must be planned
  private   the most memory that is the process's own, without what its imports take
  mapped    pages of the data's files: the ranks of a machine share them, and the system takes them back at need

Times are in seconds of the clock, and in brackets of the processor, which tell more where others compute too.
Linux alone says which memory is private.
"""

import argparse
import multiprocessing as mp
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from nmt.data.batch_iterator import BatchIterator
from nmt.data.batching import Window, plan_window
from nmt.data.indexed_dataset import IndexedDataset, bin_path, idx_path
from nmt.data.options import BatchingOptions
from nmt.data.order import Permutation
from nmt.data.parallel_dataset import ParallelDataset

BLOCK = 2**20
LONGEST = 250  # tokens of a sentence
SIDES = ("source", "target")
SEED = 1


@dataclass
class Found:
    """What one rank took."""

    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By the clock, and of the processor."""
    updates: int = 0
    """In an epoch."""
    updates_a_window: float = 0.0
    private: int = 0
    """Bytes."""
    mapped: int = 0
    """Bytes."""

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = time.perf_counter() - start[0], time.process_time() - start[1]


def main() -> None:
    args = parse_arguments()
    with TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_corpus(folder, args.pairs)
        rows = []
        for world_size in args.ranks:
            # A process of its own, so that its memory is its own.
            with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
                rows.append(pool.submit(measure, folder, args.max_tokens, world_size).result())
    report(args, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=100_000_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        sys.exit("This system does not say which memory is private (/proc/self/status). Take Linux.")
    if min(args.pairs, *args.ranks) < 1:
        parser.error("pairs and ranks must be at least 1")
    if args.max_tokens < LONGEST:
        parser.error(f"--max-tokens must be at least {LONGEST}, the longest sentence")
    return args


def write_corpus(folder: Path, num_pairs: int) -> None:
    """Write both sides in the layout of `nmt/data/indexed_dataset.py`: lengths are random, ids are zeros."""
    files = [idx_path(folder / side).open("wb") for side in SIDES]
    for file in files:
        file.write(struct.pack("<9sQBQ", b"MMIDIDX\0\0", 1, 8, num_pairs))
    starts = range(0, num_pairs, BLOCK)
    for start in starts:
        for file, lengths in zip(files, random_lengths(start, min(BLOCK, num_pairs - start)), strict=True):
            file.write(lengths.astype("<i4").tobytes())
    ends = [0, 0]
    for start in starts:  # the same again
        for side, lengths in enumerate(random_lengths(start, min(BLOCK, num_pairs - start))):
            offsets = ends[side] + 2 * np.cumsum(lengths)
            files[side].write((offsets - 2 * lengths).astype("<i8").tobytes())
            ends[side] = int(offsets[-1])
    for file, end, side in zip(files, ends, SIDES, strict=True):
        file.close()
        with bin_path(folder / side).open("wb") as ids:
            ids.truncate(end)


def random_lengths(start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of both sides from a place on, eos included: 25 tokens on average, and alike."""
    random = np.random.default_rng(start)
    source = random.gamma(2.5, 10.0, count)
    target = source * random.normal(1.05, 0.15, count)
    return tuple(np.clip(side, 2, LONGEST).astype(np.int64) for side in (source, target))  # type: ignore[return-value]


def measure(folder: Path, max_tokens: int, world_size: int) -> Found:
    """Run the last of some ranks."""
    found, memory = Found(), Memory()
    options = BatchingOptions(max_tokens=max_tokens)
    with memory.watched():
        with found.timed("open"):
            pairs = ParallelDataset(*(IndexedDataset(folder / side) for side in SIDES))
            assert max(pairs.longest) <= LONGEST
        batches = new_iterator(pairs, options, world_size)
        with found.timed("survey"):
            assert batches.num_examples == len(pairs)
        with found.timed("first"):
            next(iter(batches))
        found.updates = batches.updates_per_epoch
        state = batches.state_dict()
        batches.close()
        middle = new_iterator(pairs, options, world_size)
        middle.load_state_dict(state | in_the_middle(state, num_batches=len(batches.first_batches)))
        assert middle.num_examples == len(pairs)  # the same pass once more, which is not the seek
        with found.timed("seek"):
            next(iter(middle))
        middle.close()
        window = Window(Permutation(len(pairs), SEED, epoch=1), number=0, size=options.window_size)
        with found.timed("window"):
            num_batches = len(plan_window(pairs.sizes, [(batches.limits, 0)], window=window))
    found.private, found.mapped = memory.private, memory.mapped
    found.updates_a_window = num_batches / world_size
    return found


def new_iterator(pairs: ParallelDataset, options: BatchingOptions, world_size: int) -> BatchIterator:
    return BatchIterator(pairs, options, seed=SEED, rank=world_size - 1, world_size=world_size)


def in_the_middle(state: dict, *, num_batches: int) -> dict:
    """Return what a position in the middle of the epoch has: half of a window of so many batches is consumed."""
    window = -(-state["dataset_size"] // state["window_size"]) // 2
    ((limits, _),) = state["cuts"]
    consumed = window * state["window_size"]
    return {"window": window, "cuts": [[limits, num_batches // 2]], "examples_consumed": consumed}


class Memory:
    """The most memory of this process since it was asked for: its own, without what it had, and mapped files."""

    def __init__(self) -> None:
        self.private = self.mapped = 0
        self._before = self._now()

    @contextmanager
    def watched(self) -> Iterator[None]:
        is_over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(is_over,))
        watcher.start()
        try:
            yield
        finally:
            is_over.set()
            watcher.join()

    def _watch(self, is_over: threading.Event) -> None:
        while not is_over.wait(0.02):
            private, mapped = self._now()
            self.private = max(self.private, private - self._before[0])
            self.mapped = max(self.mapped, mapped - self._before[1])

    def _now(self) -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        private, mapped = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
        return private, mapped


def report(args: argparse.Namespace, rows: list[Found]) -> None:
    print(f"{args.pairs:,} pairs, batches of {args.max_tokens:,} tokens, {os.cpu_count()} cores")
    names = ("open", "survey", "first", "seek", "window")
    heads = [*(f"{name}, s" for name in names), "updates", "a window", "private, MB", "mapped, MB"]
    print("| ranks | " + " | ".join(heads) + " |")
    print("|---" * (1 + len(heads)) + "|")
    for world_size, row in zip(args.ranks, rows, strict=True):
        times = [f"{row.seconds[name][0]:.2f} ({row.seconds[name][1]:.2f})" for name in names]
        memory = [f"{row.private / 1e6:,.0f}", f"{row.mapped / 1e6:,.0f}"]
        cells = [*times, f"{row.updates:,}", f"{row.updates_a_window:,.0f}", *memory]
        print(f"| {world_size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
