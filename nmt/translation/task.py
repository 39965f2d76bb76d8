"""The translation task: vocabularies, data, model, loss, and BLEU on the validation set."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nmt.data.batching import cut_batches
from nmt.data.data_directory import DataDirectory
from nmt.data.indexed_dataset import IndexedDataset
from nmt.data.packing import PackedDataset, PackedShape, PackedTranslationBatch
from nmt.data.parallel_dataset import ParallelDataset, TranslationBatch
from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID, Vocabulary
from nmt.distributed import World
from nmt.errors import UserError
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.generation.static_search import StaticSearch
from nmt.models.inference import InferenceTransformer
from nmt.models.transformer import Transformer
from nmt.task import Illustrations, LossOutput
from nmt.translation.assets import TranslationAssets
from nmt.translation.loss import TranslationLoss, packed_translation_loss, translation_loss
from nmt.translation.options import TranslationOptions
from nmt.translation.r_drop import r_drop_loss
from nmt.translation.table import Row, markdown_table
from nmt.translation.word_dropout import drop_words

_BEAM = 5
_TOKENS_AT_ONCE = {"cpu": 2048}  # to translate
_TOKENS_AT_ONCE_ELSEWHERE = 8192
_NUM_SHOWN = 8


class TranslationTask:
    """Translation from `source_lang` to `target_lang`."""

    metrics: Mapping[str, Literal["min", "max"]]

    def __init__(
        self, options: TranslationOptions, assets: TranslationAssets, *, loss: TranslationLoss | None = None
    ) -> None:
        """Open the vocabularies; the loss is that of the options unless another one is given."""
        self.options = options
        self.loss = loss or _loss_of(options)
        self.packed_loss = None
        if loss is None and not options.r_drop:
            self.packed_loss = partial(packed_translation_loss, label_smoothing=options.label_smoothing)
        self.metrics = {"loss": "min", "nll": "min", "ppl": "min"}
        if options.eval_bleu:
            self.metrics = {**self.metrics, "bleu": "max"}
        self.assets = assets
        self.source_lang, self.target_lang = assets.source_lang, assets.target_lang
        self.source_vocabulary = assets.vocabulary(self.source_lang)
        self.target_vocabulary = assets.vocabulary(self.target_lang)
        self.source_segmenter = assets.make_segmenter(self.source_vocabulary)
        self.target_segmenter = assets.make_segmenter(self.target_vocabulary)

    def build_model(self) -> nn.Module:
        """Return a freshly initialised Transformer."""
        options = self.options.model
        if options.share_all_embeddings and self.source_vocabulary != self.target_vocabulary:
            raise UserError(
                "`share-all-embeddings` must have one vocabulary for both languages, but "
                f"dict.{self.source_lang}.txt and dict.{self.target_lang}.txt in `{self.assets.folder}` differ. "
                "Leave it out, or preprocess both with one dictionary."
            )
        return Transformer(
            options,
            source_vocabulary_size=len(self.source_vocabulary),
            target_vocabulary_size=len(self.target_vocabulary),
            pad_id=PAD_ID,
        )

    def open_split(self, split: str) -> ParallelDataset:
        """Open "train", "valid" or "test" of the data directory.

        Raises:
            UserError: The split is missing or damaged, was made with another vocabulary than the model's, or
                is longer than the model has positions for.
        """
        directory = self._data_directory()
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
        dataset = ParallelDataset(
            IndexedDataset(directory.split_prefix(split, directory.source_lang)),
            IndexedDataset(directory.split_prefix(split, directory.target_lang)),
            split=split,
        )
        if split == "valid" and self.options.eval_bleu:
            self._bleu(["a"], ["a"])  # a tokeniser that is missing is found out here
        longest = dataset.sizes.max(axis=0).tolist()
        model = self.options.model
        for side, length, limit in zip(
            ("source", "target"),
            longest,
            (model.max_source_positions, model.max_target_positions),
            strict=True,
        ):
            if length > limit:
                raise UserError(
                    f"`max-{side}-positions` must be at least {length}, the longest {side} of `{split}` in "
                    f"`{directory.path}`, but is {limit}. Raise it, or preprocess with `--max-length {limit}`."
                )
        return dataset

    def pack(self, examples: ParallelDataset, *, max_tokens: int, max_sentences: int) -> PackedDataset | None:
        """Return training examples to be packed, or None for a loss that is made for padded batches."""
        if self.packed_loss is None:
            return None
        longest = min(int(examples.sizes.max()), max_tokens)
        shape = PackedShape.of(max_tokens=max_tokens, max_sentences=max_sentences, longest=longest)
        return PackedDataset(examples, shape)

    def compute_loss(self, model: nn.Module, batch: TranslationBatch | PackedTranslationBatch) -> LossOutput:
        """Return the loss, summed over target tokens."""
        assert isinstance(model, Transformer)
        if model.training and self.options.word_dropout:
            batch = drop_words(batch, self.options.word_dropout)
        if isinstance(batch, PackedTranslationBatch):
            assert self.packed_loss is not None
            return self.packed_loss(model, batch)
        return self.loss(model, batch)

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return loss, negative log-likelihood and R-Drop's divergence a target token (nats); the perplexity."""
        num_targets = max(sums["num_targets"], 1.0)
        means = {name: sums[name] / num_targets for name in ("loss", "nll", "kl") if name in sums}
        return {**means, "ppl": math.exp(min(means["nll"], 700.0))}  # float64 ends at exp(709)

    def evaluate(self, model: nn.Module, examples: ParallelDataset, world: World) -> dict[str, float]:
        """Translate the examples and return their BLEU, or nothing if `eval_bleu` is off."""
        if not self.options.eval_bleu:
            return {}
        assert isinstance(model, Transformer)
        at_once = _TOKENS_AT_ONCE.get(world.device.type, _TOKENS_AT_ONCE_ELSEWHERE)
        batches = cut_batches(examples.sizes[:, :1], max_tokens=at_once)
        translations = self._translate(model, examples, batches[world.rank :: world.size], world)
        everywhere = {index: tokens for part in world.gather(translations) for index, tokens in part.items()}
        texts = self.target_segmenter.decode([everywhere[index] for index in range(len(examples))])
        return {"bleu": self._bleu(texts, self._references(examples))}

    def illustrate(self, model: nn.Module, examples: ParallelDataset, world: World) -> Illustrations:
        """Show some sentences, evenly spread over the split, as the model reads and translates them."""
        if not world.is_main or len(examples) == 0:
            return Illustrations()
        assert isinstance(model, Transformer)
        shown = np.unique(np.linspace(0, len(examples) - 1, _NUM_SHOWN).astype(np.int64))
        tokens = self._translate(model, examples, [shown], world)
        sources, references = zip(*map(examples.__getitem__, shown.tolist()), strict=True)
        rows = map(
            Row,
            self.source_segmenter.decode(sources),
            self.target_segmenter.decode(references),
            self.target_segmenter.decode(tokens[i] for i in shown.tolist()),
        )
        return Illustrations(texts={"translations": markdown_table(rows)})

    def save_assets(self, folder: Path) -> None:
        """Copy what translating needs besides the weights: vocabularies, segmenter, languages."""
        self.assets.save(folder)

    def _translate(
        self, model: Transformer, examples: ParallelDataset, batches: Iterable[NDArray[Any]], world: World
    ) -> dict[int, list[int]]:
        """Return the tokens of the best translation of each example in the batches of indices."""
        decoding = DecodingOptions(beam=self.options.eval_beam or _BEAM)
        fast = InferenceTransformer(model)  # made each time: it holds the weights as they are now
        # Training goes on in the memory of what is recorded: that is made anew too.
        static_search = StaticSearch([fast]) if world.device.type == "cuda" else None
        generator = Generator(
            [fast], decoding, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID, static_search=static_search
        )
        translations: dict[int, list[int]] = {}
        for indices in batches:
            source = examples.collate([examples[i] for i in indices]).source.to(world.device)
            for index, hypotheses in zip(indices.tolist(), generator.generate(source), strict=True):
                translations[index] = hypotheses[0].tokens
        return translations

    def _bleu(self, texts: Sequence[str], references: Sequence[str]) -> float:
        from nmt.translation.scoring import bleu  # sacreBLEU is not loaded to translate alone

        return bleu(texts, references, target_lang=self.target_lang).score

    def _references(self, examples: ParallelDataset) -> list[str]:
        """Return the raw target text of a split, or its pieces where no raw text was kept."""
        directory = self._data_directory()
        if directory.has_raw_text and examples.split in ("valid", "test"):
            return _read_lines(directory.raw_path(examples.split, self.target_lang))
        return self.target_segmenter.decode(
            [target for _, target in map(examples.__getitem__, range(len(examples)))]
        )

    def _data_directory(self) -> DataDirectory:
        return DataDirectory(self.options.data)


def _loss_of(options: TranslationOptions) -> TranslationLoss:
    if options.r_drop:
        return partial(r_drop_loss, label_smoothing=options.label_smoothing, alpha=options.r_drop)
    return partial(translation_loss, label_smoothing=options.label_smoothing)


def _read_lines(path: Path) -> list[str]:
    """Read text whose lines end with a newline and nothing else (`str.splitlines` knows other ends)."""
    return path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")


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
