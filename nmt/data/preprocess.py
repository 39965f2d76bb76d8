"""The story of nmt-preprocess: raw text in, a data directory out."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nmt.data.binarize import BlockEncoder, SideReport, SplitFiles, SplitReport, binarize
from nmt.data.data_directory import FORMAT_VERSION, MODEL_NAME, RECORD_NAME, dictionary_name, split_name
from nmt.data.indexed_dataset import smallest_dtype
from nmt.data.languages import guess_language, is_named_otherwise
from nmt.data.options import PreprocessOptions
from nmt.data.overwriting import check_inputs_stay, check_replaceable
from nmt.data.pair_blocks import BLOCK_BYTES, read_blocks, unequal_counts
from nmt.data.segmenter import Segmenter, find_misnamed_pieces, read_vocabulary, train_segmenter
from nmt.data.segmenter_file import without_paths
from nmt.data.text_lines import TextFile, check_file, find_file, read_lines
from nmt.data.vocabulary import Vocabulary
from nmt.errors import UserError, by_number, counted
from nmt.system.new_folder import new_folder

MAX_TRAINING_SENTENCES = 10_000_000  # of both sides together, for SentencePiece
_LARGE_SHARE_TOO_LONG = 0.01
_LINES_TO_GUESS_BY = 1000  # to guess the language
_LARGE_SHARE_UNKNOWN = 0.1  # of pieces that are unknown, or bytes

Log = Callable[[str], object]


@dataclass(frozen=True)
class Split:
    """The two files of a split, checked."""

    source: TextFile
    target: TextFile


def preprocess(options: PreprocessOptions, *, log: Log, block_bytes: int = BLOCK_BYTES) -> None:
    """Make a data directory.

    Faults of the input files are found before anything is written. The directory gets its name when it is
    complete. Its files do not depend on `options.workers`.

    Args:
        options: What to make it of, and how.
        log: Called with each line of the report.
        block_bytes: Size of the blocks of raw text that workers are given.

    Raises:
        UserError: Anything is wrong with the input, the options, or the place of the directory.
    """
    check_replaceable(options.destdir, overwrite=options.overwrite)
    splits = _check_splits(options)
    if options.overwrite:
        check_inputs_stay(
            options.destdir, [file.path for split in splits.values() for file in (split.source, split.target)]
        )
    for line in _look_at_language(options.target_lang, next(iter(splits.values())).target):
        log(line)
    with new_folder(options.destdir, replaces=True) as folder:
        vocabulary = _make_segmenter(options, splits, folder / MODEL_NAME, log)
        segmenter = Segmenter(folder / MODEL_NAME, vocabulary)
        reports = {
            name: _make_split(name, split, options, segmenter, folder, log, block_bytes)
            for name, split in splits.items()
        }
        if "train" in reports:
            train = reports["train"]
            vocabulary = vocabulary.with_counts((train.source.counts + train.target.counts).tolist())
        for lang in (options.source_lang, options.target_lang):
            vocabulary.save(folder / dictionary_name(lang))
        record = _make_record(options, splits, reports, vocabulary, folder)
        (folder / RECORD_NAME).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
        check_replaceable(options.destdir, overwrite=options.overwrite)  # something new may be there by now
    log(f"{options.destdir}: complete")


def _check_splits(options: PreprocessOptions) -> dict[str, Split]:
    """Find and read through all input files."""
    prefixes = {"train": options.trainpref, "valid": options.validpref, "test": options.testpref}
    paths = {
        name: (find_file(prefix, options.source_lang), find_file(prefix, options.target_lang))
        for name, prefix in prefixes.items()
        if prefix is not None
    }
    splits = {}
    for name, (source_path, target_path) in paths.items():
        source, target = check_file(source_path), check_file(target_path)
        if source.num_lines != target.num_lines:
            raise unequal_counts(source.path, source.num_lines, target.path, target.num_lines)
        splits[name] = Split(source, target)
    return splits


def _look_at_language(lang: str, file: TextFile) -> Iterator[str]:
    """Yield a line if a text looks like a language that BLEU treats specially, but its code names another one."""
    lines = itertools.islice(read_lines(file.path), _LINES_TO_GUESS_BY)
    guess = guess_language(b"".join(lines).decode("utf-8"))
    if guess is not None and is_named_otherwise(lang, guess):
        yield (
            f"warning: {file.path} looks like `{guess}`, but its language is named `{lang}`: BLEU will take other "
            f"words. Name it by a code of `{guess}`."
        )


def _make_segmenter(
    options: PreprocessOptions, splits: dict[str, Split], model_path: Path, log: Log
) -> Vocabulary:
    """Train a SentencePiece model, or take the given one, and return its vocabulary."""
    if options.sentencepiece_model is not None:
        check_plain_file(options.sentencepiece_model, "sentencepiece-model")
        model_path.write_bytes(without_paths(options.sentencepiece_model.read_bytes()))
        vocabulary = read_vocabulary(options.sentencepiece_model)
        log(f"SentencePiece model: {options.sentencepiece_model}, {counted(len(vocabulary), 'piece')}")
        if misnamed := find_misnamed_pieces(options.sentencepiece_model):
            named = " ".join(misnamed)
            log(
                f"warning: pieces of it are named like special symbols, and unknown where text has them: {named}"
            )
        return vocabulary
    start = time.monotonic()
    train = splits["train"]
    num_lines = train.source.num_lines + train.target.num_lines
    if num_lines > MAX_TRAINING_SENTENCES:
        log(
            f"SentencePiece model: trained on {MAX_TRAINING_SENTENCES:,} of {counted(num_lines, 'line')}, "
            "evenly spread over both sides"
        )
    size = train_segmenter(
        sample_lines([train.source, train.target], MAX_TRAINING_SENTENCES),
        model_path,
        vocab_size=options.vocab_size,
        model_type=options.model_type,
        character_coverage=options.character_coverage,
        extra_symbols=options.extra_symbols,
        normalization=options.normalization,
        named=f"{train.source.path} and {train.target.path}",
    )
    if size < options.vocab_size:
        log(f"warning: `vocab-size` lowered from {options.vocab_size:,} to {size:,}: the text yields no more")
    log(f"SentencePiece model: trained, {counted(size, 'piece')}, {time.monotonic() - start:.1f} s")
    return read_vocabulary(model_path)


def check_plain_file(path: Path, name: str) -> None:
    """Raise `UserError` unless an option names a file that can be read more than once; a pipe cannot."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else "missing"
        raise UserError(f"`{name}` must be a plain file, but {path} is {found}. Name a file that stays.")


def sample_lines(files: Iterable[TextFile], max_lines: int) -> Iterator[bytes]:
    """Yield the lines of the files; if there are more than `max_lines`, yield that number, evenly spread."""
    files = list(files)
    num_lines = sum(file.num_lines for file in files)
    wanted = min(max_lines, num_lines)
    lines = (line for file in files for line in read_lines(file.path))
    for index, line in enumerate(lines):
        # True for `wanted` of the indices in range(num_lines), at even distances
        if (index + 1) * wanted // num_lines > index * wanted // num_lines:
            yield line


def _make_split(
    name: str,
    split: Split,
    options: PreprocessOptions,
    segmenter: Segmenter,
    folder: Path,
    log: Log,
    block_bytes: int,
) -> SplitReport:
    """Binarise one split and report on it."""
    source, target = split.source.path, split.target.path
    languages = (options.source_lang, options.target_lang)
    keep_text = name != "train"
    prefixes = [folder / split_name(name, *languages, lang) for lang in languages]
    texts = [folder / f"{name}.{lang}" if keep_text else None for lang in languages]
    start = time.monotonic()
    with tqdm(desc=name, total=split.source.num_lines, unit=" pairs", unit_scale=True, disable=None) as bar:
        report = binarize(
            read_blocks(source, target, block_bytes=block_bytes),
            BlockEncoder(segmenter, source, target, options.max_length, keep_text, keep_long=keep_text),
            SplitFiles(*prefixes, *texts),
            num_workers=options.workers,
            progress=bar.update,
        )
    for line in _describe(name, report, options, time.monotonic() - start):
        log(line)
    if report.num_pairs == 0:
        raise UserError(
            f"{source} and {target} must hold pairs to keep, but all ({report.num_read:,}) were dropped, "
            f"{_describe_dropped(report, options)}. Check the files and `max-length`."
        )
    return report


def _describe(name: str, report: SplitReport, options: PreprocessOptions, seconds: float) -> Iterator[str]:
    """Yield the lines of the report on a split."""
    yield (
        f"{name}: {counted(report.num_pairs, 'pair')}; dropped {_describe_dropped(report, options)}; "
        f"{seconds:.1f} s ({report.num_read / max(seconds, 1e-3):,.0f} pairs/s)"
    )
    for lang, side in ((options.source_lang, report.source), (options.target_lang, report.target)):
        yield (
            f"{name}.{lang}: {counted(side.num_tokens, 'token')}, unk {side.rate(side.num_unk):.4%}, "
            f"byte fallback {side.rate(side.num_bytes):.4%}"
        )
        for what, count in (("unknown", side.num_unk), ("bytes", side.num_bytes)):
            if side.rate(count) > _LARGE_SHARE_UNKNOWN:
                yield (
                    f"warning: {side.rate(count):.1%} of the pieces of {name}.{lang} are {what}: the model "
                    "hardly knows this text. Is it the right model, and is the text of this language?"
                )
    if report.num_long:
        are = by_number(report.num_long, "pair is", "pairs are")
        yield f"{name}: {report.num_long:,} {are} longer than {counted(options.max_length, 'piece')}, and kept"
    if report.dropped["too_long"] > _LARGE_SHARE_TOO_LONG * report.num_read:
        share = report.dropped["too_long"] / report.num_read
        yield (
            f"warning: {share:.1%} of the pairs of {name} were dropped as longer than "
            f"{counted(options.max_length, 'piece')}. Are the sentences split, and is `max-length` as meant?"
        )


def _describe_dropped(report: SplitReport, options: PreprocessOptions) -> str:
    empty, too_long = report.dropped["empty"], report.dropped["too_long"]
    return f"{empty:,} with an empty side, {too_long:,} longer than {counted(options.max_length, 'piece')}"


def _make_record(
    options: PreprocessOptions,
    splits: dict[str, Split],
    reports: dict[str, SplitReport],
    vocabulary: Vocabulary,
    folder: Path,
) -> dict[str, Any]:
    """Return the content of `preprocess.json`: nothing that depends on time, place or number of workers."""
    model = options.sentencepiece_model
    return {
        "format_version": FORMAT_VERSION,
        "source_lang": options.source_lang,
        "target_lang": options.target_lang,
        "joined_vocabulary": True,
        "vocabulary_size": len(vocabulary),
        "dtype": smallest_dtype(len(vocabulary)).name,
        "sentencepiece_model": {
            "trained": model is None,
            "sha256": hashlib.sha256((folder / MODEL_NAME).read_bytes()).hexdigest(),
        },
        "options": {
            "vocab_size": options.vocab_size if model is None else None,
            "model_type": options.model_type if model is None else None,
            "character_coverage": options.character_coverage if model is None else None,
            "extra_symbols": list(options.extra_symbols) if model is None else None,
            "normalization": options.normalization if model is None else None,
            "max_length": options.max_length,
        },
        "splits": {
            name: {
                "pairs": report.num_pairs,
                "dropped": report.dropped,
                "sides": {
                    options.source_lang: _describe_side(report.source, splits[name].source),
                    options.target_lang: _describe_side(report.target, splits[name].target),
                },
            }
            for name, report in reports.items()
        },
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "versions": {
            name: metadata.version(distribution)
            for name, distribution in (
                ("nmt", "nmt-toolkit"),
                ("sentencepiece", "sentencepiece"),
                ("numpy", "numpy"),
            )
        },
    }


def name_in_record(path: Path) -> str:
    """Return the name of a file as text of UTF-8, even if the locale has another encoding."""
    return os.fsencode(path.name).decode("utf-8", errors="backslashreplace")


def _describe_side(side: SideReport, text: TextFile) -> dict[str, Any]:
    return {
        "tokens": side.num_tokens,
        "unk": side.num_unk,
        "unk_rate": side.rate(side.num_unk),
        "byte_fallback": side.num_bytes,
        "byte_fallback_rate": side.rate(side.num_bytes),
        "input": {"file": name_in_record(text.path), "lines": text.num_lines, "sha256": text.sha256},
    }
