"""Blocks of raw pairs -> token ids, in worker processes, appended in the order of the blocks.

The result of a block depends on the block alone, and results are written in order. So the files are the same, byte
for byte, for any number of workers.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nmt.data.indexed_dataset import IndexedDatasetWriter, smallest_dtype
from nmt.data.pair_blocks import Block
from nmt.data.segmenter import Segmenter
from nmt.data.text_lines import decode_lines
from nmt.data.vocabulary import EOS_ID, UNK_ID
from nmt.errors import UserError


class EncodedSide(NamedTuple):
    """One side of the pairs of a block that were kept."""

    ids: NDArray[np.integer]  # all sentences one after the other, each with EOS at its end
    sizes: NDArray[np.int64]  # tokens per sentence, EOS included
    counts: NDArray[np.int64]  # (V,) how often each id stands in `ids`
    text: bytes  # the raw lines; empty if they were not asked for


class EncodedBlock(NamedTuple):
    """What a worker makes of a block."""

    num_read: int
    num_empty: int
    num_too_long: int
    source: EncodedSide
    target: EncodedSide


@dataclass(frozen=True)
class BlockEncoder:
    """Turns a block of raw pairs into ids, without the pairs that cannot be used. Pickles to worker processes."""

    segmenter: Segmenter
    source_path: Path  # the paths are for error texts only
    target_path: Path
    max_length: int  # tokens of the longer side, EOS included
    keep_text: bool = False
    keep_long: bool = False  # count longer pairs, but keep them

    def __call__(self, block: Block) -> EncodedBlock:
        """Encode the pairs. Drop those with an empty side, and those whose longer side exceeds `max_length`.

        With `keep_long`, as for validation and test pairs, length is no reason to drop a pair.

        A side is empty if it is blank (see `nmt.data.text`), or if normalisation leaves nothing of it.
        """
        raw_sides = (block.source, block.target)
        paths = (self.source_path, self.target_path)
        is_empty = np.zeros(block.num_pairs, dtype=np.bool_)
        longest = np.zeros(block.num_pairs, dtype=np.int64)
        encoded = []
        for raw, path in zip(raw_sides, paths, strict=True):
            lines = decode_lines(raw, path, first_line=block.first_line)
            ids, sizes = self.segmenter.encode_flat(lines)
            is_empty |= sizes == 0
            np.maximum(longest, sizes + 1, out=longest)
            encoded.append((ids, sizes))
        is_too_long = (longest > self.max_length) & ~is_empty
        is_kept = ~is_empty if self.keep_long else ~(is_empty | is_too_long)
        source, target = (
            self._keep(ids, sizes, raw, is_kept) for (ids, sizes), raw in zip(encoded, raw_sides, strict=True)
        )
        return EncodedBlock(block.num_pairs, int(is_empty.sum()), int(is_too_long.sum()), source, target)

    def _keep(
        self, ids: NDArray[np.int32], sizes: NDArray[np.int64], raw: bytes, is_kept: NDArray[np.bool_]
    ) -> EncodedSide:
        """Select the kept sentences of one side and end each with EOS."""
        vocabulary_size = len(self.segmenter.vocabulary)
        kept_ids = ids[np.repeat(is_kept, sizes)]
        kept_sizes = sizes[is_kept] + 1
        with_eos = np.full(len(kept_ids) + len(kept_sizes), EOS_ID, dtype=smallest_dtype(vocabulary_size))
        is_piece = np.ones(len(with_eos), dtype=np.bool_)
        is_piece[np.cumsum(kept_sizes) - 1] = False
        with_eos[is_piece] = kept_ids
        text = b""
        if self.keep_text:
            lines = raw.split(b"\n")[:-1]
            text = b"".join(line.rstrip(b"\r") + b"\n" for line in itertools.compress(lines, is_kept))
        return EncodedSide(with_eos, kept_sizes, np.bincount(with_eos, minlength=vocabulary_size), text)


@dataclass
class SideReport:
    """What became of one side of a split."""

    counts: NDArray[np.int64]  # (V,) tokens by id
    num_bytes: int = 0  # byte-fallback pieces

    @property
    def num_tokens(self) -> int:
        """Tokens, each sentence's EOS included."""
        return int(self.counts.sum())

    @property
    def num_unk(self) -> int:
        """Unknown tokens."""
        return int(self.counts[UNK_ID])

    def rate(self, count: int) -> float:
        """Return a count as a share of the pieces, EOS not counted."""
        return count / max(1, self.num_tokens - int(self.counts[EOS_ID]))


@dataclass
class SplitReport:
    """What became of a split."""

    source: SideReport
    target: SideReport
    num_read: int = 0
    num_long: int = 0  # pairs above `max_length` that were kept
    dropped: dict[str, int] = field(default_factory=lambda: {"empty": 0, "too_long": 0})  # pairs by reason

    @property
    def num_pairs(self) -> int:
        """Pairs that were kept."""
        return self.num_read - sum(self.dropped.values())


@dataclass(frozen=True)
class SplitFiles:
    """Where a split is written."""

    source_prefix: Path
    target_prefix: Path
    source_text: Path | None = None  # raw lines of the kept pairs
    target_text: Path | None = None


def binarize(
    blocks: Iterable[Block],
    encoder: BlockEncoder,
    files: SplitFiles,
    *,
    num_workers: int = 1,
    progress: Callable[[int], object] = lambda num_pairs: None,
) -> SplitReport:
    """Encode the blocks of one split and write them.

    Args:
        blocks: The raw pairs.
        encoder: Encodes each block; it must have `keep_text` if `files` names raw texts.
        files: Where to write.
        num_workers: Number of processes; with 1 everything is done in this one.
        progress: Called after each block with its number of pairs.

    Returns:
        The counts of the split.

    Raises:
        UserError: A line is not UTF-8, the two files differ in length, or a worker process died.
    """
    vocabulary_size = len(encoder.segmenter.vocabulary)
    is_byte = encoder.segmenter.is_byte
    report = SplitReport(
        SideReport(np.zeros(vocabulary_size, np.int64)), SideReport(np.zeros(vocabulary_size, np.int64))
    )
    side_reports = (report.source, report.target)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedDatasetWriter(prefix, smallest_dtype(vocabulary_size)))
            for prefix in (files.source_prefix, files.target_prefix)
        ]
        texts = [
            stack.enter_context(path.open("wb")) if path is not None else None
            for path in (files.source_text, files.target_text)
        ]
        for encoded in _encode_in_order(blocks, encoder, num_workers=num_workers):
            sides = (encoded.source, encoded.target)
            for side, writer, text, counted in zip(sides, writers, texts, side_reports, strict=True):
                writer.add_many(side.ids, side.sizes)
                if text is not None:
                    text.write(side.text)
                counted.counts += side.counts
                counted.num_bytes += int(side.counts[is_byte].sum())
            report.num_read += encoded.num_read
            report.dropped["empty"] += encoded.num_empty
            if encoder.keep_long:
                report.num_long += encoded.num_too_long
            else:
                report.dropped["too_long"] += encoded.num_too_long
            progress(encoded.num_read)
    return report


def _encode_in_order(
    blocks: Iterable[Block], encoder: BlockEncoder, *, num_workers: int
) -> Iterator[EncodedBlock]:
    """Yield the encoded blocks in their order, with at most two blocks per worker under way."""
    blocks = iter(blocks)
    first_blocks = list(itertools.islice(blocks, num_workers))
    blocks = itertools.chain(first_blocks, blocks)
    num_workers = min(num_workers, len(first_blocks))
    if num_workers <= 1:
        yield from map(encoder, blocks)
        return
    # Spawned, not forked: a fork copies the locks of other threads (a progress bar has one), even held ones.
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder,),
    )
    try:
        pending: deque[Future[EncodedBlock]] = deque()
        for block in blocks:
            pending.append(pool.submit(_encode_in_worker, block))
            if len(pending) >= 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "the worker processes must stay alive, but one was killed, perhaps for lack of memory. "
            "Try again with fewer `workers`."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: (
    BlockEncoder  # set once in each worker process, so that the model need not be sent with each block
)


def _start_worker(encoder: BlockEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the parent was killed; otherwise workers would wait for its next block for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(block: Block) -> EncodedBlock:
    return _worker_encoder(block)
