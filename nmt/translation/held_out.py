"""Translations of a validation or test set: every pair, however long, by the model as it is now."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from nmt.data.batching import cut_batches
from nmt.data.order import Indices
from nmt.data.parallel_dataset import ParallelDataset, pad_right
from nmt.data.segmenter import PieceSegmenter, Segmenter
from nmt.data.vocabulary import EOS_ID
from nmt.generation.generator import Generator
from nmt.translation.long_sentences import join_texts, split_to_ids

_TOKENS_AT_ONCE = {"cpu": 2048}
_TOKENS_AT_ONCE_ELSEWHERE = 8192


def translate_held_out(
    generator: Generator,
    examples: ParallelDataset,
    indices: Iterable[int],
    *,
    source: Segmenter | PieceSegmenter,
    target: Segmenter | PieceSegmenter,
    source_text: Callable[[int], str],
    language: str,
    positions: int,
    device: torch.device,
) -> dict[int, str]:
    """Return the best translation of each example, by its index.

    Args:
        generator: The search.
        examples: The examples of a split.
        indices: Which examples to translate.
        source: The segmenter that made their sources.
        target: Turns ids into text.
        source_text: Returns a source as text, to cut it.
        language: The language of the target.
        positions: The most tokens that the model takes, eos included. A longer source is cut as in nmt-generate:
            its parts are translated separately, and joined.
        device: The device of the model.
    """
    parts = [
        (index, part)
        for index in indices
        for part in source_parts(
            examples[index][0], source, longest=positions, text=partial(source_text, index)
        )
    ]
    tokens: list[list[int]] = [[] for _ in parts]
    lengths = np.array([[len(part)] for _, part in parts], dtype=np.int64).reshape(-1, 1)
    at_once = _TOKENS_AT_ONCE.get(device.type, _TOKENS_AT_ONCE_ELSEWHERE)
    batches: Sequence[Indices] = cut_batches(lengths, max_tokens=at_once)
    for batch in batches:
        padded, _ = pad_right([parts[place][1] for place in batch])
        sources = torch.from_numpy(padded).to(device)
        for place, hypotheses in zip(batch.tolist(), generator.generate(sources), strict=True):
            tokens[place] = hypotheses[0].tokens
    texts: dict[int, list[str]] = {}
    for (index, _), text in zip(parts, target.decode(tokens), strict=True):
        texts.setdefault(index, []).append(text)
    return {
        index: own[0] if len(own) == 1 else join_texts(own, language=language) for index, own in texts.items()
    }


def source_parts(
    ids: NDArray[np.integer],
    segmenter: Segmenter | PieceSegmenter,
    *,
    longest: int,
    text: Callable[[], str],
) -> list[NDArray[np.integer]]:
    """Cut a source so that each part with its eos has at most `longest` ids.

    Args:
        ids: The source.
        segmenter: Made the ids from text.
        longest: The most ids of a part.
        text: Returns the source as text, which is cut at punctuation if possible.
    """
    if len(ids) <= longest:
        return [ids]
    parts = [
        np.append(part[: longest - 1], EOS_ID)
        for _, part in split_to_ids(text(), segmenter, limit=longest - 1)
    ]
    return parts or [np.append(ids[: longest - 1], EOS_ID)]


def sample_lines(
    sources: Sequence[str], references: Sequence[str], translations: Mapping[int, str], numbers: Sequence[int]
) -> list[str]:
    """Return a line for each sample, with its source, its reference, and the model's translation.

    Args:
        sources: The source texts.
        references: Their reference translations.
        translations: The model's translations, by index.
        numbers: The indices, in the order of the texts.
    """
    return [
        f"sample, line {number + 1} | {_shown(source)} | wanted: {_shown(reference)} | "
        f"model: {_shown(translations[number])}"
        for number, source, reference in zip(numbers, sources, references, strict=True)
    ]


def _shown(text: str, *, longest: int = 200) -> str:
    """Return a text that is safe for a terminal, cut if it is too long."""
    cut = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in cut)
