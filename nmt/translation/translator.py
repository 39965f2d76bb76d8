"""Text in, text out: segmenter, batches by length, search, and the order of the input again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmt.checkpoint import load_model
from nmt.data.batching import cut_batches
from nmt.data.parallel_dataset import collate_pairs, pad_right
from nmt.data.segmenter import PieceSegmenter
from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.errors import UserError
from nmt.generation.beam_search import Hypothesis
from nmt.generation.generator import Generator, TranslationModel
from nmt.generation.options import DecodingOptions
from nmt.models.inference import InferenceTransformer
from nmt.models.transformer import Transformer
from nmt.translation.task import TranslationTask

Precision = Literal["fp32", "bf16"]


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
    source_ids: NDArray[Any]  # (S,) the pieces that were translated, without eos
    num_dropped_pieces: int = 0  # at the end of a source that is too long: they were not translated

    @property
    def text(self) -> str:
        """The best translation."""
        return self.texts[0] if self.texts else ""


class Translator:
    """A translation model, or several that vote, ready for text."""

    def __init__(
        self,
        models: Sequence[Transformer],
        task: TranslationTask,
        *,
        device: torch.device | str,
        input_is_pieces: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        """Take models that are on `device` and in evaluation mode, and the task that they were made for.

        Args:
            models: At least one.
            task: Their vocabularies, and how text becomes pieces.
            device: Where they are.
            input_is_pieces: Sources and references are split into pieces already, joined by blanks.
            precision: Of the weights that search; "fp32" leaves them as they are.
        """
        self.models = models
        dtype = torch.bfloat16 if precision == "bf16" else None
        self.fast_models = [InferenceTransformer(model, dtype) for model in models]
        self.task = task
        self.device = torch.device(device)
        self.source_segmenter = (
            PieceSegmenter(task.source_vocabulary) if input_is_pieces else task.source_segmenter
        )
        self.target_segmenter = (
            PieceSegmenter(task.target_vocabulary) if input_is_pieces else task.target_segmenter
        )

    @classmethod
    def load(
        cls,
        path: Path | str | Sequence[Path | str],
        device: torch.device | str = "cpu",
        *,
        input_is_pieces: bool = False,
        precision: Precision = "fp32",
    ) -> Translator:
        """Load a model folder, or several whose probabilities are averaged.

        Raises:
            UserError: A folder is no model folder, is damaged, or holds a model that does not translate; or the
                vocabularies of several differ.
        """
        paths = [path] if isinstance(path, (str, Path)) else list(path)
        models, tasks = zip(*(_load(Path(path), device) for path in paths), strict=True)
        for other, other_path in zip(tasks[1:], paths[1:], strict=True):
            if (other.source_vocabulary, other.target_vocabulary) != (
                tasks[0].source_vocabulary,
                tasks[0].target_vocabulary,
            ):
                raise UserError(
                    f"`{other_path}` must have the vocabularies of `{paths[0]}` to translate with it, "
                    "but has others. Take models that were trained on one data directory."
                )
        return cls(models, tasks[0], device=device, input_is_pieces=input_is_pieces, precision=precision)

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
        prefixes: Iterable[NDArray[Any]] | None = None,
        on_progress: Callable[[int], object] | None = None,
    ) -> Iterator[Translation]:
        """Translate a stream of lines, in memory for `buffer_size` of them.

        Args:
            lines: Text, without newlines.
            options: How to search.
            batching: How to gather lines.
            prefixes: For each line the ids that its translation begins with (see `Generator.generate`).
            on_progress: Called with the number of lines that have just been translated.

        Yields:
            One translation for each line, in the order of the lines.
        """
        generator = self._generator(options, self.fast_models)

        def search(sources: list[NDArray[Any]], starts: list[NDArray[Any]]) -> list[list[Hypothesis]]:
            return generator.generate(
                self._padded(sources), self._padded(starts) if prefixes is not None else None
            )

        starts = itertools.chain(prefixes or (), itertools.repeat(_NOTHING))  # a line may have none
        return self._in_buffers(lines, starts, search, batching or Batching(), on_progress or _ignore)

    def score_lines(
        self,
        lines: Iterable[str],
        references: Iterable[NDArray[Any]],
        *,
        batching: Batching | None = None,
        on_progress: Callable[[int], object] | None = None,
    ) -> Iterator[Translation]:
        """Let the model score given translations, instead of searching for its own.

        Args:
            lines: Text, without newlines.
            references: For each line the ids of its translation, eos at the end.
            batching: How to gather lines.
            on_progress: Called with the number of lines that have just been scored.

        Yields:
            For each line its reference as the only hypothesis, in the order of the lines.
        """
        generator = self._generator(DecodingOptions(), self.models)

        def score(sources: list[NDArray[Any]], targets: list[NDArray[Any]]) -> list[list[Hypothesis]]:
            batch = collate_pairs(list(zip(sources, targets, strict=True))).to(self.device)
            return generator.score(batch.source, batch.target_input, batch.target)

        endless = itertools.chain(
            references, itertools.repeat(np.array([EOS_ID]))
        )  # for lines that have none
        return self._in_buffers(lines, endless, score, batching or Batching(), on_progress or _ignore)

    def encode_references(self, lines: Sequence[str]) -> list[NDArray[Any]]:
        """Return the ids of target text, eos at the end of each.

        Raises:
            UserError: One is longer than the models have positions for.
        """
        longest = min(model.max_target_positions for model in self.models)
        references = [np.append(ids, EOS_ID) for ids in self.target_segmenter.encode(lines)]
        for number, ids in enumerate(references, start=1):
            if len(ids) > longest:
                raise UserError(
                    f"A reference must have at most {longest} pieces with the end of sentence, as many as the "
                    f"model takes, but line {number} has {len(ids)}. Shorten it."
                )
        return references

    def _generator(self, options: DecodingOptions, models: Sequence[TranslationModel]) -> Generator:
        return Generator(models, options, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID)

    def _in_buffers(
        self,
        lines: Iterable[str],
        targets: Iterable[NDArray[Any]],
        run: _Run,
        batching: Batching,
        on_progress: Callable[[int], object],
    ) -> Iterator[Translation]:
        remaining = zip(lines, targets, strict=False)
        while buffer := list(itertools.islice(remaining, batching.buffer_size)):
            buffered_lines, buffered_targets = zip(*buffer, strict=True)
            yield from self._run_buffer(buffered_lines, buffered_targets, run, batching, on_progress)

    def _run_buffer(
        self,
        lines: Sequence[str],
        targets: Sequence[NDArray[Any]],
        run: _Run,
        batching: Batching,
        on_progress: Callable[[int], object],
    ) -> list[Translation]:
        """Cut lines into batches by length, run each, and put the results into the order of the lines.

        A line without pieces has no result.
        """
        encoded = self.source_segmenter.encode(lines)
        longest = min(model.max_source_positions for model in self.models) - 1  # eos takes a position too
        sources = [np.append(ids[:longest], EOS_ID) for ids in encoded]
        translations = [
            Translation(line, [], [], ids[:longest], num_dropped_pieces=max(len(ids) - longest, 0))
            for line, ids in zip(lines, encoded, strict=True)
        ]
        lengths = np.array([(len(x), len(y)) for x, y in zip(sources, targets, strict=True)])
        filled = (lengths[:, 0] > 1).nonzero()[0]  # lines that have a piece besides eos
        on_progress(len(lines) - len(filled))
        for chosen in cut_batches(
            lengths[filled], max_tokens=batching.max_tokens, max_sentences=batching.batch_size
        ):
            indices = filled[chosen].tolist()
            results = run([sources[i] for i in indices], [targets[i] for i in indices])
            texts = iter(self.task.target_segmenter.decode([x.tokens for nbest in results for x in nbest]))
            for i, nbest in zip(indices, results, strict=True):
                own = list(itertools.islice(texts, len(nbest)))
                translations[i] = replace(translations[i], texts=own, hypotheses=nbest)
            on_progress(len(indices))
        return translations

    def _padded(self, sentences: Sequence[NDArray[Any]]) -> Tensor:
        return torch.from_numpy(pad_right(sentences)[0]).to(self.device)


_Run = Callable[[list[NDArray[Any]], list[NDArray[Any]]], list[list[Hypothesis]]]
_NOTHING: NDArray[Any] = np.empty(0, dtype=np.int32)


def _load(path: Path, device: torch.device | str) -> tuple[Transformer, TranslationTask]:
    loaded: tuple[object, object] = load_model(path, device)
    model, task = loaded
    if not isinstance(model, Transformer) or not isinstance(task, TranslationTask):
        kind = type(model).__name__
        raise UserError(f"`{path}` must hold a translation model, but holds a {kind} of another task.")
    return model, task


def _ignore(_: int) -> None:
    pass
