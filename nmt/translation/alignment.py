"""Find the word of the source that a word of the translation comes from, by the model's attention.

Alignment uses the attention of one decoder layer when the model predicts the token. This is the last layer unless
another one is chosen. docs/decoding.md says how well this agrees with statistical word alignment, and what the
other layers give.

Shapes: S source length, T target length, both without the end of sentence; W words.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nmt.data.parallel_dataset import collate_pairs
from nmt.data.piece_spans import Span
from nmt.data.segmenter import PieceSegmenter, Segmenter
from nmt.data.vocabulary import EOS_ID
from nmt.errors import UserError
from nmt.models.protocols import AttendingModel
from nmt.translation.batch_runner import Batching, BatchRunner
from nmt.translation.long_sentences import joiner, split_ids
from nmt.translation.request import Translation
from nmt.translation.translator import Translator

_WORD = re.compile(r"\S+")
Links = list[tuple[int, int]]
Weights = NDArray[np.float32]
Membership = NDArray[np.bool_]
"""(W, N): whether a piece contains a part of a word. A piece may contain parts of several words."""


def check_layer(translator: Translator, layer: int) -> None:
    """Raise a `UserError` unless all models have attention in this layer."""
    for model in translator.models:
        if not isinstance(model, AttendingModel):
            raise UserError(
                f"The model must attend to the source to tell alignments, but a {type(model).__name__} has no "
                "attention to tell them from. Leave out `print-alignment` and `plot-attention`."
            )
    num_layers = min(model.num_attention_layers for model in _attending(translator))
    if not -num_layers <= layer < num_layers:
        raise UserError(f"`alignment-layer` must be from {-num_layers} to {num_layers - 1}, but is {layer}.")


def _attending(translator: Translator) -> list[AttendingModel]:
    models: list[AttendingModel] = [model for model in translator.models if isinstance(model, AttendingModel)]
    assert len(models) == len(translator.models), "see check_layer"
    return models


def align(translator: Translator, translations: Sequence[Translation], *, layer: int) -> list[list[Links]]:
    """Align each hypothesis of each translation with its source.

    Words are separated by white space in the source line and in the text, before any normalisation. If the input
    is in pieces, the words are pieces. Each word of the text is linked to the source word that it attends to most.

    Args:
        translator: The mean attention of its models is used.
        translations: From this translator.
        layer: The decoder layer.

    Returns:
        For each hypothesis, pairs (place in the source, place in the text), from 0, in the order of the text.
    """
    pairs = [(x.source_ids, hypothesis.tokens) for x in translations for hypothesis in x.hypotheses]
    weights = iter(attention(translator, pairs, layer=layer))
    aligned = []
    for x in translations:
        source_words = words_of_source(x, translator.source_segmenter)
        aligned.append(
            [
                link_words(
                    next(weights),
                    source_words,
                    words_of_given_text(text, hypothesis.tokens, translator.target_segmenter)
                    if x.is_given
                    else words_of_text(
                        text, hypothesis.tokens, translator.target_segmenter, translator.task.target_lang
                    ),
                )
                for text, hypothesis in zip(x.texts, x.hypotheses, strict=True)
            ]
        )
    return aligned


def attention(
    translator: Translator, pairs: Sequence[tuple[Sequence[int] | NDArray[Any], Sequence[int]]], *, layer: int
) -> list[Weights]:
    """Return how much each token of a translation attends to each token of its source.

    Args:
        translator: The mean attention of its models is used.
        pairs: Ids of a source and of its translation, with eos between the parts of a split sentence.
        layer: The decoder layer.

    Returns:
        For each pair (T, S+1); the last column is the attention to the end of the sentence. A part of a split
        sentence has 0 outside its own block. The row of an eos between two parts has only 0.
    """
    parts = [
        (number, np.array([*source, EOS_ID]), np.array([*target, EOS_ID]))
        for number, (sources, targets) in enumerate(pairs)
        for source, target in zip(split_ids(sources), split_ids(targets), strict=True)  # type: ignore[arg-type]
    ]
    found: dict[int, Weights] = {}
    models = _attending(translator)

    @torch.inference_mode()
    def run(batch: list[int], _: bool) -> list[Weights]:
        collated = collate_pairs([parts[i][1:] for i in batch]).to(translator.device)
        mean = sum(
            model.attention_weights(collated.source, collated.target_input, layer=layer) for model in models
        ) / len(models)
        assert not isinstance(mean, float)
        rows = mean.cpu().numpy()
        # Position t predicts token t; the last one predicts eos.
        return [rows[k, : len(parts[i][2]) - 1, : len(parts[i][1])] for k, i in enumerate(batch)]

    if parts:
        lengths = np.array([(len(source), len(target)) for _, source, target in parts])
        for batch, results in BatchRunner(Batching()).run(lengths, run):
            found.update(zip(batch, results, strict=True))
    own: list[list[Weights]] = [[] for _ in pairs]
    for place, (number, _, _) in enumerate(parts):
        own[number].append(found[place])
    return [_block_diagonal(blocks) for blocks in own]


def _block_diagonal(blocks: Sequence[Weights]) -> Weights:
    """Put the parts of a split sentence together, with a row and a column of eos between them."""
    if len(blocks) == 1:
        return blocks[0]
    num_rows = sum(len(block) + 1 for block in blocks) - 1
    whole = np.zeros((num_rows, sum(block.shape[1] for block in blocks)), dtype=np.float32)
    row = column = 0
    for block in blocks:
        whole[row : row + len(block), column : column + block.shape[1]] = block
        row += len(block) + 1
        column += block.shape[1]
    return whole


def words_of_source(translation: Translation, segmenter: Segmenter | PieceSegmenter) -> Membership:
    """Return which words of the source line its pieces belong to; an eos between parts belongs to none."""
    if isinstance(segmenter, PieceSegmenter):
        return _pieces_as_words(translation.source_ids)
    spans: list[Span | None] = []
    end = 0
    for number, (part, ids) in enumerate(
        zip(
            translation.parts or [translation.source], split_ids(translation.source_ids.tolist()), strict=True
        )
    ):
        spans += [None] * (number > 0)
        start = translation.source.index(part, end)
        end = start + len(part)
        spans += [(start + a, start + b) for a, b in segmenter.spans(part)[: len(ids)]]
    return _membership(translation.source, spans)


def words_of_text(
    text: str, tokens: Sequence[int], segmenter: Segmenter | PieceSegmenter, language: str
) -> Membership:
    """Return which words of a translation its tokens belong to; an eos between parts belongs to none."""
    if isinstance(segmenter, PieceSegmenter):
        return _pieces_as_words(tokens)
    spans: list[Span | None] = []
    start = 0
    for number, ids in enumerate(split_ids(tokens)):
        spans += [None] * (number > 0)
        (part,) = segmenter.decode([ids])
        # Parts without text are not in the joined text.
        start += len(joiner(language)) if part and start else 0
        spans += [(start + a, start + b) for a, b in segmenter.decoded_spans(ids)]
        start += len(part)
    return _membership(text, spans)


def words_of_given_text(
    text: str, tokens: Sequence[int], segmenter: Segmenter | PieceSegmenter
) -> Membership:
    """Return which words of a text its tokens belong to."""
    if isinstance(segmenter, PieceSegmenter):
        return _pieces_as_words(tokens)
    return _membership(text, segmenter.spans(text)[: len(tokens)])


def _pieces_as_words(ids: Sequence[int] | NDArray[Any]) -> Membership:
    is_piece = np.array(ids, dtype=np.int64) != EOS_ID
    return np.eye(len(is_piece), dtype=np.bool_)[is_piece]


def _membership(text: str, spans: Sequence[Span | None]) -> Membership:
    """Return which words of a text each piece belongs to.

    Args:
        text: A line, with words separated by white space.
        spans: Where the pieces are in the text. An empty span, or one of only white space, belongs to the next
            word, or to the last word.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    membership = np.zeros((len(words), len(spans)), dtype=np.bool_)
    for place, span in enumerate(spans):
        if span is None or not words:
            continue
        start, end = span
        own = [number for number, (a, b) in enumerate(words) if a < end and start < b]
        if not own:
            own = [next((number for number, (_, b) in enumerate(words) if b > start), len(words) - 1)]
        membership[own, place] = True
    return membership


def link_words(weights: Weights, source_words: Membership, target_words: Membership) -> Links:
    """Link each word of a text to the word of the source that its pieces attend to most.

    Args:
        weights: (T, S+1), from `attention`.
        source_words: (W, S): which words of the source each piece belongs to.
        target_words: (W', T): the same for the text.
    """
    if not len(source_words):
        return []
    by_word = target_words.astype(np.float64) @ weights[:, :-1] @ source_words.T  # (W', W)
    return [(source, target) for target, source in enumerate(by_word.argmax(axis=1).tolist())]


def to_pharaoh(links: Links) -> str:
    """Write links as `0-0 1-2`."""
    return " ".join(f"{source}-{target}" for source, target in links)
