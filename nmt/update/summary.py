"""The metrics that a task forms of its sums, and plain means of the sums that it does not use."""

from collections.abc import Iterator, Mapping
from typing import Any

from nmt.task import Task

_COUNTS = frozenset({"num_targets", "num_examples", "num_cancelled"})


class _Watched(Mapping[str, float]):
    """Sums that know which of them were read."""

    def __init__(self, sums: Mapping[str, float]) -> None:
        self._sums = sums
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> float:
        self.read.add(name)
        return self._sums[name]

    def __contains__(self, name: object) -> bool:
        return name in self._sums

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


def summarize(task: Task[Any], sums: Mapping[str, float]) -> dict[str, float]:
    """Return the ratios that a task forms, and the mean per target of each sum that it has not looked at.

    Args:
        task: Forms ratios.
        sums: Over many batches and all ranks; the number of targets is one of them.
    """
    watched = _Watched(sums)
    results = task.summarize(watched)
    left = [name for name in sums if name not in watched.read | _COUNTS and name not in results]
    return {**results, **{name: sums[name] / max(sums["num_targets"], 1.0) for name in left}}
