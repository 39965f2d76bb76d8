"""The translation task: vocabularies, data, model, loss, and BLEU on the validation set."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from torch import nn

from nmt.data.data_directory import DataDirectory, dictionary_name
from nmt.data.indexed_dataset import IndexedDataset
from nmt.data.packing import PackedDataset, PackedShape, PackedTranslationBatch
from nmt.data.parallel_dataset import ParallelDataset, Sentences, TranslationBatch
from nmt.data.text_lines import decode_lines, read_lines
from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID, Vocabulary
from nmt.distributed import World
from nmt.errors import UserError
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.generation.static_search import static_search
from nmt.models.known_parts import why_padded
from nmt.models.protocols import PackedModel, SearchModel, TranslationModel
from nmt.models.search_form import search_form
from nmt.task import Illustrations, LossOutput
from nmt.task_extras import Words
from nmt.translation.assets import TranslationAssets, is_same_file
from nmt.translation.held_out import sample_lines, translate_held_out
from nmt.translation.illustration import Row, markdown_table
from nmt.translation.loss import TranslationLoss, packed_translation_loss, translation_loss
from nmt.translation.options import TranslationOptions
from nmt.translation.r_drop import r_drop_loss
from nmt.translation.unknown_pieces import about_specials, about_unknown
from nmt.translation.word_dropout import drop_words

_BEAM = 5
_NUM_SHOWN = 8
_NUM_SAMPLES = 3  # in the log

TrainSides = Callable[["TranslationTask"], tuple[Sentences, Sentences]]
"""Opens the sources and the targets to train on, as ids of the task's vocabularies."""


class TranslationTask:
    """Translation from `source_lang` to `target_lang`."""

    metrics: Mapping[str, Literal["min", "max"]]
    words = Words(target="target token", examples="pairs")

    def __init__(
        self,
        options: TranslationOptions[Any],
        assets: TranslationAssets,
        *,
        loss: TranslationLoss | None = None,
        train_sides: TrainSides | None = None,
    ) -> None:
        """Open the vocabularies.

        Args:
            options: Of the task.
            assets: The vocabularies, and what splits text into pieces.
            loss: Instead of that of the options.
            train_sides: Opens what is trained on, instead of the data directory's `train`.
        """
        self.options = options
        self.loss = loss or _loss_of(options)
        self.train_sides = train_sides
        self.packed_loss = None
        if loss is None and not options.r_drop:
            self.packed_loss = partial(packed_translation_loss, label_smoothing=options.label_smoothing)
        self.metrics = {"loss": "min", "nll": "min", "ppl": "min"}
        if options.eval_bleu:
            self.metrics = {**self.metrics, "bleu": "max", "chrf": "max"}
        self.assets = assets
        self._said: str | None = None
        self.source_lang, self.target_lang = assets.source_lang, assets.target_lang
        self.source_vocabulary = assets.vocabulary(self.source_lang)
        self.target_vocabulary = assets.vocabulary(self.target_lang)
        self.source_segmenter = assets.make_segmenter(self.source_vocabulary)
        self.target_segmenter = assets.make_segmenter(self.target_vocabulary)

    def build_model(self) -> nn.Module:
        """Return a freshly initialised model, of the kind that the options are for."""
        options = self.options.model
        is_shared = getattr(options, "share_all_embeddings", False)
        if is_shared and self.source_vocabulary != self.target_vocabulary:
            raise UserError(
                "`share-all-embeddings` must have one vocabulary for both languages, but "
                f"dict.{self.source_lang}.txt and dict.{self.target_lang}.txt in `{self.assets.folder}` differ. "
                "Leave it out, or preprocess both with one dictionary."
            )
        model: nn.Module = options.build(
            source_vocabulary_size=len(self.source_vocabulary),
            target_vocabulary_size=len(self.target_vocabulary),
            pad_id=PAD_ID,
        )
        return model

    def open_split(self, split: str) -> ParallelDataset:
        """Open "train", "valid" or "test" of the data directory, or what is trained on instead of its "train".

        A validation or test set is measured as it is. An example that is longer than the model has positions for
        is cut only for the loss.

        Raises:
            UserError: The split is missing or damaged, was made with another vocabulary than the model's, or
                is for training and longer than the model has positions for.
        """
        directory = self._data_directory
        model = self.options.model
        named = f"`{split}`" if split == "train" and self.train_sides else f"`{split}` of `{directory.path}`"
        source, target = self._open_sides(directory, split)
        dataset = ParallelDataset(
            source,
            target,
            split=split,
            positions=None if split == "train" else (model.max_source_positions, model.max_target_positions),
        )
        if len(dataset) == 0:
            raise UserError(f"{named} must hold pairs, but is empty. Make it again.")
        if split == "valid" and self.options.eval_bleu:
            self._scores(["a"], ["a"])  # raises an error now if a tokeniser is missing
            # These do so if the SentencePiece model does not fit the dictionary, or raw text cannot be read.
            self.target_segmenter.decode([[UNK_ID]])
            if directory.has_raw_text:
                self._references(dataset)
        for side, length, limit in zip(
            ("source", "target"),
            dataset.longest,
            (model.max_source_positions, model.max_target_positions),
            strict=True,
        ):
            if length > limit:
                raise UserError(
                    f"`max-{side}-positions` must be at least {length}, the longest {side} of {named}, "
                    f"but is {limit}. Raise it, or preprocess with `--max-length {limit}`."
                )
        return dataset

    def _open_sides(self, directory: DataDirectory, split: str) -> tuple[Sentences, Sentences]:
        if split == "train" and self.train_sides is not None:
            return self.train_sides(self)
        return (
            _open_side(directory, split, directory.source_lang, self.source_vocabulary),
            _open_side(directory, split, directory.target_lang, self.target_vocabulary),
        )

    def look_over(self, train: ParallelDataset, valid: ParallelDataset, world: World) -> list[str]:
        """Return lines on unknown tokens and on faults of the data, which may come from another program."""
        if not world.is_main:
            return []
        lines = []
        for name, examples in (("train", train), ("valid", valid)):
            source, target = examples.count_oddities()
            lines += about_unknown(name, (source.unknown_share, target.unknown_share))
            num_specials = source.num_specials + target.num_specials
            lines += about_specials(name, num_specials, source.num_without_end + target.num_without_end)
        return lines

    def why_padded(self, model: nn.Module) -> str | None:
        """Return why batches are padded and not packed: a loss or a model that is not ours may need padding."""
        if self.options.r_drop:
            return "`r-drop` is computed on padded batches alone"
        if self.packed_loss is None or type(self).compute_loss is not TranslationTask.compute_loss:
            return "the loss is not that of this package"
        return why_padded(model)

    def pack(self, examples: ParallelDataset, *, max_tokens: int, max_sentences: int) -> PackedDataset:
        """Return training examples to be packed."""
        longest = min(max(examples.longest), max_tokens)
        shape = PackedShape.of(max_tokens=max_tokens, max_sentences=max_sentences, longest=longest)
        return PackedDataset(examples, shape)

    def compute_loss(self, model: nn.Module, batch: TranslationBatch | PackedTranslationBatch) -> LossOutput:
        """Return the loss, summed over target tokens."""
        if model.training and self.options.word_dropout:
            batch = drop_words(batch, self.options.word_dropout)
        if isinstance(batch, PackedTranslationBatch):
            assert self.packed_loss is not None
            return self.packed_loss(cast(PackedModel, model), batch)
        return self.loss(cast(TranslationModel, model), batch)

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return, for each target token in nats, loss, likelihood and R-Drop's divergence; and the perplexity."""
        num_targets = max(sums["num_targets"], 1.0)
        means = {name: sums[name] / num_targets for name in ("loss", "nll", "kl") if name in sums}
        return {**means, "ppl": math.exp(min(means["nll"], 700.0))}  # float64 ends at exp(709)

    def evaluate(self, model: nn.Module, examples: ParallelDataset, world: World) -> dict[str, float]:
        """Translate the examples and return their BLEU and chrF2, or nothing if `eval_bleu` is off."""
        if not self.options.eval_bleu:
            return {}
        by_length = np.argsort(examples.sizes[:][:, 0], kind="stable").tolist()
        translations = self._translate(model, examples, by_length[world.rank :: world.size], world)
        everywhere = {index: text for part in world.gather(translations) for index, text in part.items()}
        texts = [everywhere[index] for index in range(len(examples))]
        return self._scores(texts, self._references(examples))

    def illustrate(self, model: nn.Module, examples: ParallelDataset, world: World) -> Illustrations:
        """Show some sentences, evenly spread over the split, as the model reads and translates them."""
        if not world.is_main or len(examples) == 0:
            return Illustrations()
        shown = _spread(len(examples), _NUM_SHOWN)
        translations = self._translate(model, examples, shown, world)
        sources, references = self._texts(examples, shown)
        rows = map(Row, sources, references, (translations[i] for i in shown))
        return Illustrations(texts={"translations": markdown_table(rows)})

    def remarks(
        self, model: nn.Module, examples: ParallelDataset, results: Mapping[str, float], world: World
    ) -> list[str]:
        """Show some translations, the same sentences each time; add a note if BLEU is too low to mean anything."""
        if not world.is_main or len(examples) == 0 or not self.options.eval_bleu:
            return []
        shown = _spread(len(examples), _NUM_SAMPLES)
        translations = self._translate(model, examples, shown, world)
        lines = sample_lines(*self._texts(examples, shown), translations, shown)
        from nmt.translation.scoring import low_bleu_note

        note = low_bleu_note(results["bleu"], results["chrf"])
        return lines if note is None else [*lines, note]

    def next_command(self, model: Path) -> str:
        """Return the command that translates with a model of this task."""
        return f"nmt-generate --model {model} --input FILE.{self.source_lang}"

    def is_same_asset(self, before: Path, now: Path) -> bool:
        """Return whether two files of assets mean the same; the counts of a dictionary mean nothing."""
        return is_same_file(before, now)

    def save_assets(self, folder: Path) -> None:
        """Copy what translation needs besides the weights: vocabularies, segmenter, languages."""
        self.assets.save(folder)

    def _translate(
        self, model: nn.Module, examples: ParallelDataset, indices: Iterable[int], world: World
    ) -> dict[int, str]:
        """Return the best translation of each of some examples, by its index."""
        decoding = DecodingOptions(beam=self.options.eval_beam or _BEAM)
        fast = self._search_form(model, world)  # made each time: it copies the weights as they are now
        # Recordings are made each time, too, because training reuses their memory.
        in_place = static_search([fast]) if world.device.type == "cuda" else None
        return translate_held_out(
            Generator([fast], decoding, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID, static_search=in_place),
            examples,
            indices,
            source=self.source_segmenter,
            target=self.target_segmenter,
            source_text=self._source_text(examples),
            language=self.target_lang,
            positions=self.options.model.max_source_positions,
            device=world.device,
        )

    def check_model(self, model: nn.Module, world: World) -> None:
        """Log it on rank 0 if validations cannot search with the fast form of the model."""
        if self.options.eval_bleu:
            self._search_form(model, world)

    def _search_form(self, model: nn.Module, world: World) -> SearchModel:
        form, remark = search_form(cast(TranslationModel, model))
        if remark is not None and remark != self._said:
            self._said = remark  # so that it is logged once, and not at each validation
            if world.is_main:
                print(f"warning: {remark}", file=sys.stderr)
        return form

    def _scores(self, texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        from nmt.translation.scoring import bleu, chrf  # here, because translation alone needs no sacreBLEU

        score = bleu(texts, references, target_lang=self.target_lang).score
        return {"bleu": score, "chrf": chrf(texts, references).score}

    def _references(self, examples: ParallelDataset) -> list[str]:
        """Return the raw target text of a split, or its pieces if no raw text was kept."""
        if (raw := self._raw_text(examples, self.target_lang)) is not None:
            return raw
        return self.target_segmenter.decode(
            [target for _, target in map(examples.__getitem__, range(len(examples)))]
        )

    def _source_text(self, examples: ParallelDataset) -> Callable[[int], str]:
        """Return a function from an index to its source text; the raw text is read at its first call."""
        raw: list[str] | None = None

        def text(index: int) -> str:
            nonlocal raw
            raw = raw or self._raw_text(examples, self.source_lang)
            return raw[index] if raw else self.source_segmenter.decode([examples[index][0]])[0]

        return text

    def _raw_text(self, examples: ParallelDataset, lang: str) -> list[str] | None:
        """Return one side of a split as text before segmentation, if it was kept."""
        if examples.split not in ("valid", "test"):
            return None
        directory = self._data_directory
        if not directory.has_raw_text:
            return None
        return _read_lines(directory.raw_path(examples.split, lang), len(examples))

    def _texts(self, examples: ParallelDataset, indices: Sequence[int]) -> tuple[list[str], list[str]]:
        """Return the sources and targets of some examples, as the model reads them."""
        sources, references = zip(*map(examples.__getitem__, indices), strict=True)
        return self.source_segmenter.decode(sources), self.target_segmenter.decode(references)

    @cached_property
    def _data_directory(self) -> DataDirectory:
        """The data. They are opened once, since that reads both dictionaries, and the indexes of fairseq's data.

        Raises:
            UserError: They are damaged, or were made with other languages or another vocabulary than the model's.
        """
        directory = DataDirectory(self.options.data)
        if (directory.source_lang, directory.target_lang) != (self.source_lang, self.target_lang):
            raise UserError(
                f"{directory.path} must hold data from {self.source_lang} to {self.target_lang}, as the model "
                f"translates, but is from {directory.source_lang} to {directory.target_lang}. Name other data."
            )
        for lang, vocabulary in (
            (directory.source_lang, self.source_vocabulary),
            (directory.target_lang, self.target_vocabulary),
        ):
            _check_same_vocabulary(vocabulary, directory, lang)
        return directory


def _loss_of(options: TranslationOptions[Any]) -> TranslationLoss:
    if options.r_drop:
        return partial(r_drop_loss, label_smoothing=options.label_smoothing, alpha=options.r_drop)
    return partial(translation_loss, label_smoothing=options.label_smoothing)


def _open_side(directory: DataDirectory, split: str, lang: str, vocabulary: Vocabulary) -> IndexedDataset:
    """Open one side of a split, and check that it fits its vocabulary."""
    side = IndexedDataset(directory.split_prefix(split, lang))
    side.check_ids(len(vocabulary), directory.path / dictionary_name(lang))
    return side


def _spread(number: int, shown: int) -> list[int]:
    """Return `shown` of `number` indices, evenly spread."""
    found: list[int] = np.unique(np.linspace(0, number - 1, shown).astype(np.int64)).tolist()
    return found


def _read_lines(path: Path, num_pairs: int) -> list[str]:
    """Read the raw text of a split, whose lines end with a newline and nothing else.

    Raises:
        UserError: It is not UTF-8, or has another number of lines than the split has pairs.
    """
    lines = [
        decode_lines(line + b"\n", path, first_line=number)[0]
        for number, line in enumerate(read_lines(path), start=1)
    ]
    if len(lines) != num_pairs:
        raise UserError(
            f"`{path}` must have a line for each pair of its split ({num_pairs:,}), but has "
            f"{len(lines):,}. Make the data directory again with nmt-preprocess."
        )
    return lines


def _check_same_vocabulary(vocabulary: Vocabulary, directory: DataDirectory, lang: str) -> None:
    other = directory.vocabulary(lang)
    if vocabulary == other:
        return
    first = next(
        (i for i, (a, b) in enumerate(zip(vocabulary.tokens, other.tokens, strict=False)) if a != b),
        min(len(vocabulary), len(other)),
    )
    raise UserError(
        f"The vocabulary of `{directory.path}` for {lang} must be the model's, but has {len(other)} types against "
        f"{len(vocabulary)} and differs from id {first} on. "
        "Preprocess with the model's sentencepiece.model (`--sentencepiece-model`)."
    )
