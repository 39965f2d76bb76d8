"""One or several models and a search: padded sources in, hypotheses out.

Shapes: B sentences, K beam size, R = B*K rows, S source length, T target length, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nmt.generation.adjust import adjust, log_probabilities
from nmt.generation.beam_search import Beam, Hypothesis, best, copy_first, extend, keep, start
from nmt.generation.options import DecodingOptions
from nmt.generation.select import select_best


class TranslationModel(Protocol):
    """What the generator asks of a model; `nmt.models.transformer.Transformer` has it."""

    training: bool
    max_target_positions: int

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the weights; if any is float64, scores are."""

    def encode(self, source: Tensor) -> Any:
        """Encode (B, S) int64. The result has `select`, to keep the sentences at the places (B',)."""

    def start_state(self) -> Any:
        """Return a state of empty prefixes. It has `reorder_`: new row i goes on from old row `rows[i]`."""

    def decode(self, target_input: Tensor, memory: Any, state: Any) -> Tensor:
        """Take new tokens (R, T) into the state and return logits (R, T, V), which the caller may overwrite."""


class Generator:
    """Translate batches of token ids. A sentence's result does not depend on its neighbours in the batch.

    Several models vote by the mean of their probabilities; they share source and target vocabularies.
    """

    def __init__(
        self,
        models: Sequence[TranslationModel],
        options: DecodingOptions,
        *,
        pad_id: int,
        eos_id: int,
        unk_id: int,
    ) -> None:
        options.check()
        self.models = models
        self.options = options
        self.pad_id = pad_id
        self.eos_id = eos_id
        self.unk_id = unk_id

    @torch.inference_mode()
    def generate(self, source: Tensor, prefixes: Tensor | None = None) -> list[list[Hypothesis]]:
        """Search for the translations of a batch.

        Args:
            source: (B, S) int64 on the models' device, each sentence ending in eos and padded on the right.
            prefixes: (B, P) int64, the tokens that translations begin with, padded on the right. One that ends
                in eos is the whole translation, and fills all places of the beam.

        Returns:
            For each sentence its `nbest` best hypotheses, best first.
        """
        assert not any(model.training for model in self.models), "call model.eval() before decoding"
        if source.size(0) == 0:
            return []
        lenpen = 0.0 if self.options.unnormalized else self.options.lenpen
        memories = [model.encode(source) for model in self.models]
        states = [model.start_state() for model in self.models]
        beam, finished = start(
            self._limits(source), beam_size=self.options.beam, dtype=_score_dtype(self.models)
        )
        last_tokens = torch.full_like(beam.scores, self.eos_id, dtype=torch.int64)  # fairseq starts from eos
        while True:
            log_probs = self._score_tokens(last_tokens, memories, states)
            forced = None
            if prefixes is not None and beam.step < prefixes.size(1):
                forced = prefixes[beam.sentences, beam.step]
            log_probs = self._adjust(log_probs, beam, forced)
            if forced is not None:
                beam, log_probs = copy_first(beam, log_probs, where=forced == self.eos_id)
            candidates = select_best(beam, log_probs)
            beam, rows = extend(beam, candidates, finished, eos_id=self.eos_id, lenpen=lenpen)
            live = (~beam.is_done).nonzero().squeeze(1)  # the one read from the device in a step
            if live.numel() == 0:
                return best(finished, nbest=self.options.nbest)
            if live.numel() < beam.is_done.numel():
                beam, rows = keep(beam, rows, live=live)
                memories = [memory.select(live) for memory in memories]
            for state in states:
                state.reorder_(rows)
            last_tokens = beam.tokens[:, :, -1]

    @torch.inference_mode()
    def score(self, source: Tensor, target_input: Tensor, target: Tensor) -> list[list[Hypothesis]]:
        """Score given translations, which no option changes.

        Args:
            source: (B, S) int64, as for `generate`.
            target_input: (B, T) int64, the target shifted right and begun with eos.
            target: (B, T) int64, each sentence ending in eos and padded on the right.

        Returns:
            For each sentence one hypothesis, whose score is the mean log-probability of its tokens.
        """
        assert not any(model.training for model in self.models), "call model.eval() before decoding"
        logits = [
            model.decode(target_input, model.encode(source), None).flatten(0, 1)  # (B, T, V) -> (B*T, V)
            for model in self.models
        ]
        log_probs = log_probabilities(logits, temperature=1.0)
        scores = log_probs.gather(1, target.view(-1, 1)).view_as(target)  # (B*T, V) -> (B, T)
        lengths = (target != self.pad_id).sum(dim=1)  # (B,)
        means = scores.masked_fill(target == self.pad_id, 0.0).sum(dim=1) / lengths
        return [
            [Hypothesis(tokens=tokens[: length - 1], score=mean, token_scores=token_scores[:length])]
            for tokens, mean, token_scores, length in zip(
                target.tolist(), means.tolist(), scores.tolist(), lengths.tolist(), strict=True
            )
        ]

    def _score_tokens(self, last_tokens: Tensor, memories: Sequence[Any], states: Sequence[Any]) -> Tensor:
        """Return the log-probabilities (B, K, V) of what follows the last tokens (B, K)."""
        target_input = last_tokens.reshape(-1, 1)  # (B, K) -> (R, 1)
        logits = [
            model.decode(target_input, memory, state)[:, -1]  # (R, 1, V) -> (R, V)
            for model, memory, state in zip(self.models, memories, states, strict=True)
        ]
        log_probs = log_probabilities(logits, temperature=self.options.temperature)
        return log_probs.view(*last_tokens.shape, -1)  # (R, V) -> (B, K, V)

    def _adjust(self, log_probs: Tensor, beam: Beam, forced: Tensor | None) -> Tensor:
        return adjust(
            log_probs,
            beam,
            options=self.options,
            pad_id=self.pad_id,
            eos_id=self.eos_id,
            unk_id=self.unk_id,
            forced=forced,
        )

    def _limits(self, source: Tensor) -> Tensor:
        """Return the length limit (B,) of each translation, eos not counted, from its own source's length."""
        longest = min(model.max_target_positions for model in self.models) - 1  # eos takes a position too
        a, b = self.options.max_len_a, self.options.max_len_b
        lengths = (source != self.pad_id).sum(dim=1).tolist()  # Python rounds alike on every device
        return source.new_tensor([min(int(a * length + b), longest) for length in lengths])


def _score_dtype(models: Sequence[TranslationModel]) -> torch.dtype:
    parameters = (parameter for model in models for parameter in model.parameters())
    return torch.float64 if any(x.dtype == torch.float64 for x in parameters) else torch.float32
