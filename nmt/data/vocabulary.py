"""Tokens and their ids, kept in fairseq's `dict.<lang>.txt`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from nmt.errors import UserError, shown

BOS_ID = 0
PAD_ID = 1
EOS_ID = 2
UNK_ID = 3
_OVERWRITE = b" #fairseq:overwrite"
_LARGEST_COUNT = 2**62
_BYTE_ORDER_MARK = "\ufeff"
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # indexed by the four ids above


class Vocabulary:
    """A map between tokens and ids: the four specials first, then the tokens in file order.

    The map is one-to-one, except for a token that overwrites an earlier one of the same name, as fairseq allows:
    both ids give the token, and the token has the later id.
    """

    def __init__(
        self, tokens: Iterable[str], counts: Iterable[int] | None = None, *, overwriting: Collection[int] = ()
    ) -> None:
        """Number the tokens.

        Args:
            tokens: The tokens after the four specials, in the order of their ids.
            counts: How often each of `tokens` was seen in training data; zeros if None.
            overwriting: Ids of the tokens that may take the name of an earlier one.

        Raises:
            UserError: A token comes twice, is a special, or is empty.
        """
        self.tokens: Sequence[str] = (*SPECIALS, *tokens)
        own_counts = tuple(counts) if counts is not None else (0,) * (len(self.tokens) - len(SPECIALS))
        self.counts: Sequence[int] = (*(0 for _ in SPECIALS), *own_counts)
        assert len(self.counts) == len(self.tokens), "one count per token"
        self.overwriting = frozenset(overwriting)
        self._ids: dict[str, int] = {}
        for index, token in enumerate(self.tokens):
            if not token:
                raise UserError(f"token {index} of the vocabulary must not be empty. Take it out.")
            if token in self._ids and index not in self.overwriting:
                raise UserError(
                    f"`{shown(token)[1:-1]}` must come once in the vocabulary, but has ids "
                    f"{self._ids[token]} and {index}"
                )
            self._ids[token] = index

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read a `dict.<lang>.txt`: `token count` per line, cut at the last space; the specials are implicit.

        A line may end with `#fairseq:overwrite`: then its token may have been there before. A byte order mark at
        the start of the file and carriage returns at the ends of lines are skipped.

        Raises:
            UserError: A line is not such a pair or not UTF-8, or a token comes twice; with file and line.
        """
        lines = (
            path.read_bytes().removeprefix(_BYTE_ORDER_MARK.encode()).split(b"\n")
        )  # "\n" alone ends a line: a piece may hold \r or U+2028
        if lines[-1] == b"":
            del lines[-1]
        first_line: dict[str, int] = dict.fromkeys(SPECIALS, 0)
        tokens: list[str] = []
        counts: list[int] = []
        overwriting: set[int] = set()
        for number, line in enumerate(lines, start=1):
            line = line.removesuffix(b"\r")
            entry = line.removesuffix(_OVERWRITE)
            if len(entry) < len(line):
                overwriting.add(len(SPECIALS) + number - 1)
            try:
                token, count = entry.decode("utf-8").rsplit(" ", 1)
                counts.append(int(count))
                if not 0 <= counts[-1] <= _LARGEST_COUNT:
                    raise ValueError
            except ValueError:  # includes UnicodeDecodeError
                raise UserError(
                    f"{path}, line {number}: must be `token count` in UTF-8, but is {shown(line)}. "
                    "Is this a dictionary made by nmt-preprocess or fairseq-preprocess?"
                ) from None
            if not token or (token in first_line and len(entry) == len(line)):
                where = f"line {first_line[token]}" if first_line.get(token) else "the special symbols"
                problem = f"`{shown(token)[1:-1]}` is already in {where}" if token else "the token is empty"
                raise UserError(f"{path}, line {number}: each token must come once, but {problem}")
            first_line.setdefault(token, number)
            tokens.append(token)
        return cls(tokens, counts, overwriting=overwriting)

    def save(self, path: Path) -> None:
        """Write the tokens after the specials, each with its count, one per line.

        Raises:
            UserError: A token holds a newline, which the format cannot express.
        """
        first = len(SPECIALS)
        lines = []
        for index in range(first, len(self.tokens)):
            token = self.tokens[index]
            flag = _OVERWRITE.decode() if index in self.overwriting else ""
            lines.append(f"{token} {self.counts[index]}{flag}")
            if "\n" in token:
                raise UserError(
                    f"the piece {shown(token)} holds a newline, which a dictionary cannot. "
                    "Take a SentencePiece model without it."
                )
        # If the first token itself begins with a byte order mark, write one more, which `load` removes.
        mark = _BYTE_ORDER_MARK if lines and lines[0].startswith(_BYTE_ORDER_MARK) else ""
        path.write_bytes((mark + "".join(line + "\n" for line in lines)).encode("utf-8"))

    def with_counts(self, counts: Sequence[int]) -> Vocabulary:
        """Return the same tokens with other counts: one per id; the counts of the specials are ignored."""
        assert len(counts) == len(self), "one count per id"
        first = len(SPECIALS)
        own = (int(count) for count in counts[first:])
        return Vocabulary(self.tokens[first:], own, overwriting=self.overwriting)

    def id(self, token: str) -> int:
        """Return the token's id, or UNK_ID for a token that is not here."""
        return self._ids.get(token, UNK_ID)

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    def __eq__(self, other: object) -> bool:
        """Compare tokens and ids; counts carry no meaning for a model."""
        return isinstance(other, Vocabulary) and self.tokens == other.tokens

    __hash__ = None  # type: ignore[assignment]  # equal by content

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} tokens)"
