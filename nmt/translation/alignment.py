"""Which word of the source a word of the translation comes from, as the model's attention tells.

It is the attention of one decoder layer, the last unless another is chosen, when the model predicts the token.
docs/decoding.md says how well that agrees with statistical word alignment, and what the other layers give.

Shapes: S source length, T target length, both without the end of sentence.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmt.data.parallel_dataset import collate_pairs
from nmt.data.segmenter import PieceSegmenter
from nmt.data.vocabulary import EOS_ID, Vocabulary
from nmt.errors import UserError
from nmt.models.cross_attention import cross_attention_weights
from nmt.translation.batches import Batching, BatchRunner
from nmt.translation.long_sentences import split_ids
from nmt.translation.translator import Translation, Translator

_WORD_START = "▁"
Links = list[tuple[int, int]]
Weights = NDArray[np.float32]


def check_layer(translator: Translator, layer: int) -> None:
    """Raise a `UserError` unless all models have this decoder layer."""
    num_layers = min(len(model.decoder.layers) for model in translator.models)
    if not -num_layers <= layer < num_layers:
        raise UserError(f"`alignment-layer` must be from {-num_layers} to {num_layers - 1}, but is {layer}.")


def align(translator: Translator, translations: Sequence[Translation], *, layer: int) -> list[list[Links]]:
    """Align each hypothesis of each translation with its source.

    Words are what blanks separate in the source line and in the text; where the input is in pieces, they are
    pieces. Each word of the text is linked to the word of the source that it attends to most.

    Args:
        translator: Its models are asked, the mean of them.
        translations: As it has found them.
        layer: Of the decoder.

    Returns:
        For each hypothesis pairs (place in the source, place in the text), from 0, in the order of the text.
    """
    pairs = [(x.source_ids, hypothesis.tokens) for x in translations for hypothesis in x.hypotheses]
    weights = iter(attention(translator, pairs, layer=layer))
    return [
        [
            link_words(
                next(weights),
                word_numbers(x.source_ids, translator.source_segmenter, translator.task.source_vocabulary),
                word_numbers(
                    hypothesis.tokens, translator.target_segmenter, translator.task.target_vocabulary
                ),
            )
            for hypothesis in x.hypotheses
        ]
        for x in translations
    ]


def attention(
    translator: Translator, pairs: Sequence[tuple[Sequence[int] | NDArray[Any], Sequence[int]]], *, layer: int
) -> list[Weights]:
    """Return what each token of a translation looks at in its source.

    Args:
        translator: Its models are asked, the mean of them.
        pairs: Ids of a source and of its translation; eos stands between the parts of those that were split.
        layer: Of the decoder.

    Returns:
        For each pair (T, S+1), the last column being the attention to the end of the sentence. A part of a split
        sentence has 0 outside its own block, and so has the row of an eos between two parts.
    """
    parts = [
        (number, np.array([*source, EOS_ID]), np.array([*target, EOS_ID]))
        for number, (sources, targets) in enumerate(pairs)
        for source, target in zip(split_ids(sources), split_ids(targets), strict=True)  # type: ignore[arg-type]
    ]
    found: dict[int, Weights] = {}

    def run(batch: list[int], _: bool) -> list[Weights]:
        collated = collate_pairs([parts[i][1:] for i in batch]).to(translator.device)
        mean = sum(
            cross_attention_weights(model, collated.source, collated.target_input, layer=layer)
            for model in translator.models
        ) / len(translator.models)
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
    """Put the parts of a split sentence together: a row and a column of eos stand between them."""
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


def word_numbers(ids: Iterable[int], segmenter: object, vocabulary: Vocabulary) -> list[int]:
    """Return for each piece the number of its word, from 0; -1 for eos between parts.

    A word begins with a piece that begins with SentencePiece's mark of a blank, or follows one that is nothing but
    the mark. Without SentencePiece each piece is a word.
    """
    numbers: list[int] = []
    current, begins = -1, True
    for index in ids:
        token = vocabulary.tokens[index]
        if index == EOS_ID:
            numbers.append(-1)
            begins = True
            continue
        if isinstance(segmenter, PieceSegmenter) or begins or token.startswith(_WORD_START):
            current += 1
        numbers.append(current)
        begins = False
    return numbers


def link_words(weights: Weights, source_words: Sequence[int], target_words: Sequence[int]) -> Links:
    """Link each word of a text to the word of the source that its pieces attend to most.

    Args:
        weights: (T, S+1), as `attention` gives them.
        source_words: (S,) the word of each piece, -1 for none.
        target_words: (T,) likewise.
    """
    num_source, num_target = (max(words, default=-1) + 1 for words in (source_words, target_words))
    if num_source == 0:
        return []
    by_word = np.zeros((num_target, num_source))
    rows, columns = np.array(target_words, dtype=np.int64), np.array(source_words, dtype=np.int64)
    is_word = np.ix_(rows >= 0, columns >= 0)
    np.add.at(by_word, np.ix_(rows[rows >= 0], columns[columns >= 0]), weights[:, :-1][is_word])
    return [(source, target) for target, source in enumerate(by_word.argmax(axis=1).tolist())]


def to_pharaoh(links: Links) -> str:
    """Write links as `0-0 1-2`."""
    return " ".join(f"{source}-{target}" for source, target in links)
