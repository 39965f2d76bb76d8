"""A "model" whose probabilities are looked up by prefix, for tests of the search alone."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

BOS, PAD, EOS, UNK, A, B = range(6)

# From the sentence's first source token and the tokens so far to the probabilities of the next token.
NextProbabilities = Callable[[int, tuple[int, ...]], Sequence[float]]


class TableMemory:
    def __init__(self, names: list[int]) -> None:
        self.names = names

    def keep(self, sentences: Tensor) -> "TableMemory":
        return self.select(sentences)

    def select(self, sentences: Tensor) -> "TableMemory":
        return TableMemory([self.names[i] for i in sentences.tolist()])


class TableState:
    """Remembers what each row was given, the start token first."""

    def __init__(self) -> None:
        self.prefixes: list[tuple[int, ...]] | None = None

    def reorder_(self, rows: Tensor) -> None:
        assert self.prefixes is not None
        self.prefixes = [self.prefixes[row] for row in rows.tolist()]


class TableModel(nn.Module):
    logit_offset = 0.0

    def __init__(
        self,
        probabilities: NextProbabilities,
        *,
        max_target_positions: int = 100,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.probabilities = probabilities
        self.max_target_positions = max_target_positions
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.num_rows: list[int] = []  # of each step
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def encode(self, source: Tensor) -> TableMemory:
        return TableMemory(source[:, 0].tolist())

    def start_state(self) -> TableState:
        return TableState()

    def step(self, new_tokens: Tensor, memory: TableMemory, state: TableState) -> Tensor:
        tokens = new_tokens.tolist()
        before = state.prefixes or [()] * len(tokens)
        state.prefixes = [(*prefix, new) for prefix, new in zip(before, tokens, strict=True)]
        beam_size = len(tokens) // len(memory.names)
        self.num_rows.append(len(tokens))
        assert all(prefix[0] == EOS for prefix in state.prefixes)
        rows = [
            self.probabilities(memory.names[row // beam_size], prefix[1:])
            for row, prefix in enumerate(state.prefixes)
        ]
        return torch.tensor(rows, dtype=self.weight.dtype).log()  # (R, V)

    def project(self, features: Tensor) -> Tensor:
        return features.clone()


def from_table(table: Mapping[tuple[int, ...], Mapping[int, float]]) -> NextProbabilities:
    """Make the function from a table {prefix: {token: probability}} that is the same for all sentences.

    A prefix that is not there ends for certain.
    """

    def probabilities(_: int, prefix: tuple[int, ...]) -> list[float]:
        row = table.get(prefix, {EOS: 1.0})
        assert math.isclose(sum(row.values()), 1.0)
        return [row.get(token, 0.0) for token in range(6)]

    return probabilities


def random_table(seed: int, vocabulary_size: int, *, sharpness: float = 2.0) -> NextProbabilities:
    """Make a function whose logits are normal noise drawn for each sentence and prefix."""
    known: dict[tuple[int, ...], list[float]] = {}

    def probabilities(name: int, prefix: tuple[int, ...]) -> list[float]:
        key = (seed, name, *prefix)
        if key not in known:
            generator = torch.Generator().manual_seed(
                hash(key) % 2**63
            )  # hashes of numbers are always the same
            logits = torch.randn(vocabulary_size, generator=generator, dtype=torch.float64)
            known[key] = (sharpness * logits).softmax(dim=0).tolist()
        return known[key]

    return probabilities
