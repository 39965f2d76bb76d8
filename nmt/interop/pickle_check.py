"""Walk through a pickle without building anything, to find where it ends and what it would cost.

Python's interpreter of pickles does everything that a pickle asks for. It allocates a memo of any size. It hashes
keys that are tuples of tuples, which takes forever if each tuple holds the one before twice. So operations that no
checkpoint needs are refused before the interpreter sees them.
"""

from __future__ import annotations

import io
import pickle
import pickletools

_REFUSED = ("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER")
_LARGEST_KEY = 64  # items of a key; items of tuples within tuples count as often as hashing reads them
_ENOUGH = 10**6
_MARK = -1
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "FROZENSET")


def end_of_pickle(file: io.BytesIO) -> int:
    """Walk through a pickle without building anything; return where it ends.

    Raises:
        UnpicklingError: It uses the registry of extensions, which the whole process shares, or it asks the
            interpreter for more memory or time than a pickle of its size can need.
        ValueError, IndexError, KeyError: It is not a pickle.
    """
    start = file.tell()
    walk = _Walk(largest_memo=len(file.getbuffer()))
    for opcode, argument, _ in pickletools.genops(file):
        walk.follow(opcode, argument)
    assert file.tell() > start
    return file.tell()


class _Walk:
    """The stack and the memo of the interpreter; each object is replaced by the cost of its hash."""

    def __init__(self, *, largest_memo: int) -> None:
        self._largest_memo = largest_memo
        self._stack: list[int] = []
        self._memo: dict[int, int] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        """Follow the next operation."""
        name = opcode.name
        if name in _REFUSED:
            raise pickle.UnpicklingError(f"the opcode {name} is not used by torch.save")
        if name == "MARK":
            self._stack.append(_MARK)
        elif name in _PUTS:
            place = len(self._memo) if argument is None else int(str(argument))
            if not 0 <= place <= self._largest_memo:
                raise pickle.UnpicklingError("the memo is larger than the file")
            self._memo[place] = self._stack[-1]
        elif name in _GETS:
            self._stack.append(self._memo[int(str(argument))])
        elif name == "DUP":
            self._stack.append(self._stack[-1])
        elif name == "POP":
            self._stack.pop()
        else:
            self._apply(opcode)

    def _apply(self, opcode: pickletools.OpcodeInfo) -> None:
        """Remove from the stack what an operation consumes, and put its result there."""
        name, before = opcode.name, opcode.stack_before
        items: list[int] = []
        num_single = len(before)
        if pickletools.markobject in before:
            while (item := self._stack.pop()) != _MARK:
                items.append(item)
            items.reverse()
            num_single = before.index(pickletools.markobject)
        single = [self._stack.pop() for _ in range(num_single)][::-1]
        if name == "SETITEM":
            self._check_keys(single[1:2])
        elif name in ("SETITEMS", "DICT"):
            self._check_keys(items[::2])
        elif name in ("ADDITEMS", "FROZENSET"):
            self._check_keys(items)
        made = min(1 + sum(items or single), _ENOUGH) if name in _TUPLES else 1
        self._stack += [made] * len(opcode.stack_after)

    def _check_keys(self, costs: list[int]) -> None:
        if any(cost > _LARGEST_KEY for cost in costs):
            raise pickle.UnpicklingError("a key must not be made of so many values")
