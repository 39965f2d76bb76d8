"""Text in, text out: segmenter, batches by length, search, and the order of the input again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nmt.checkpoint import load_model
from nmt.data.batching import cut_batches
from nmt.data.parallel_dataset import pad_right
from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.errors import UserError
from nmt.generation.beam_search import Hypothesis
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.models.transformer import Transformer
from nmt.translation.task import TranslationTask


@dataclass(frozen=True)
class Batching:
    """How lines are gathered for translation. It changes the speed and the memory, never the results."""

    buffer_size: int = 10_000  # lines read before their translations are returned; they are sorted by length
    max_tokens: int = 2048  # sentences of a batch times pieces of the longest one
    batch_size: int | None = None  # most sentences of a batch


@dataclass(frozen=True)
class Translation:
    """A line and what became of it."""

    source: str
    texts: list[str]  # of the hypotheses, best first; none for a line without pieces, such as a blank one
    hypotheses: list[Hypothesis]
    num_dropped_pieces: int = (
        0  # at the end of a source longer than the model takes: they were not translated
    )

    @property
    def text(self) -> str:
        """The best translation."""
        return self.texts[0] if self.texts else ""


class Translator:
    """A translation model, ready for text."""

    def __init__(self, model: Transformer, task: TranslationTask, *, device: torch.device | str) -> None:
        """Take a model that is on `device` and in evaluation mode, and the task that it was made for."""
        self.model = model
        self.task = task
        self.device = torch.device(device)

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> Translator:
        """Load a model folder.

        Raises:
            UserError: The folder is no model folder, is damaged, or holds a model that does not translate.
        """
        loaded: tuple[object, object] = load_model(Path(path), device)
        model, task = loaded
        if not isinstance(model, Transformer) or not isinstance(task, TranslationTask):
            kind = type(model).__name__
            raise UserError(f"`{path}` must hold a translation model, but holds a {kind} of another task.")
        return cls(model, task, device=device)

    def translate(self, lines: Sequence[str], **decoding: Any) -> list[str]:
        """Return the best translation of each line; that of a blank line is empty.

        Args:
            lines: Raw text.
            **decoding: Fields of `DecodingOptions`, such as `beam=5`.
        """
        return [translation.text for translation in self.translate_lines(lines, DecodingOptions(**decoding))]

    def translate_lines(
        self,
        lines: Iterable[str],
        options: DecodingOptions,
        *,
        batching: Batching | None = None,
        on_progress: Callable[[int], object] | None = None,
    ) -> Iterator[Translation]:
        """Translate a stream of lines, in memory for `buffer_size` of them.

        Args:
            lines: Raw text, without newlines.
            options: How to search.
            batching: How to gather lines.
            on_progress: Called with the number of lines that have just been translated.

        Yields:
            One translation for each line, in the order of the lines.
        """
        batching = batching or Batching()
        generator = Generator([self.model], options, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID)
        remaining = iter(lines)
        while buffer := list(itertools.islice(remaining, batching.buffer_size)):
            yield from self._translate_buffer(buffer, generator, batching, on_progress or _ignore)

    def _translate_buffer(
        self,
        lines: list[str],
        generator: Generator,
        batching: Batching,
        on_progress: Callable[[int], object],
    ) -> list[Translation]:
        encoded = self.task.source_segmenter.encode(lines)
        longest = self.model.max_source_positions - 1  # eos takes a position too
        sources = [np.append(ids[:longest], EOS_ID) for ids in encoded]
        translations = [Translation(line, texts=[], hypotheses=[]) for line in lines]

        lengths = np.array([len(source) for source in sources])
        filled = (lengths > 1).nonzero()[0]  # lines that have a piece besides eos
        on_progress(len(lines) - len(filled))
        for chosen in cut_batches(
            lengths[filled, None], max_tokens=batching.max_tokens, max_sentences=batching.batch_size
        ):
            indices = filled[chosen]
            batch = self._search([sources[i] for i in indices], generator)
            for i, hypotheses, texts in zip(indices.tolist(), *batch, strict=True):
                dropped = len(encoded[i]) - (len(sources[i]) - 1)
                translations[i] = Translation(lines[i], texts, hypotheses, num_dropped_pieces=dropped)
            on_progress(len(indices))
        return translations

    def _search(
        self, sources: Sequence[NDArray[Any]], generator: Generator
    ) -> tuple[list[list[Hypothesis]], list[list[str]]]:
        """Translate one batch of ids; return each sentence's hypotheses and their texts."""
        padded, _ = pad_right(sources)
        results = generator.generate(torch.from_numpy(padded).to(self.device))
        texts = iter(self.task.target_segmenter.decode([x.tokens for nbest in results for x in nbest]))
        return results, [list(itertools.islice(texts, len(nbest))) for nbest in results]


def _ignore(_: int) -> None:
    pass
