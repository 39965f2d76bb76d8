"""Additive sums in nested scopes, and gauges beside them.

A value is logged once and every open scope sees it, for example `epoch` (since the epoch began) and, inside it,
`train` (since the last report). Only sums enter; ratios are formed after the sums of all
ranks have been added. Nothing here waits for the device until `sums` or `gauges` reads.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from nmt.distributed import World, sum_dtype


class _Scope:
    """What one scope has seen."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.gauges: dict[str, Tensor | float] = {}


class Metrics:
    """The metrics of this rank, by scope."""

    def __init__(self) -> None:
        self._scopes: dict[str, _Scope] = {}
        self._open: list[str] = []  # the innermost last

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Open a scope; as a context manager, or as a decorator of a function.

        Entering a name again goes on accumulating. A scope inside itself counts once.
        """
        self._scopes.setdefault(name, _Scope())
        depth = len(self._open)
        self._open.append(name)
        try:
            yield
        finally:
            del self._open[depth:]

    def add(self, sums: Mapping[str, Tensor | float]) -> None:
        """Add to the sums of every open scope.

        Args:
            sums: additive quantities by name: numbers, or tensors with one element. They are kept in
                float64, on the device of the tensor, and cut off from the graph.
        """
        for name, value in sums.items():
            kept = _keep(value)
            for scope in self._listening():
                total = scope.sums.get(name)
                scope.sums[name] = kept if total is None else total + kept

    def gauge(self, name: str, value: Tensor | float) -> None:
        """Set a value in every open scope; only the last one counts, such as the learning rate."""
        kept = _keep(value)
        for scope in self._listening():
            scope.gauges[name] = kept

    def sums(self, name: str, world: World) -> dict[str, float]:
        """Return the sums of a scope over all ranks: one flat all-reduce, one read from the device.

        Every rank must call this; a name that a rank has not logged counts as 0 there.

        Args:
            name: the scope; one that was never entered has no sums.
            world: the ranks to add up.
        """
        scope = self._scopes.get(name, _Scope())
        names = sorted(set().union(*world.gather(list(scope.sums))))
        if not names:
            return {}
        values = [_on_device(scope.sums.get(key, 0.0), world.device) for key in names]
        flat = torch.stack(values)  # (number of names,)
        return dict(zip(names, world.sum_(flat).tolist(), strict=True))

    def gauges(self, name: str) -> dict[str, float]:
        """Return the gauges of a scope on this rank."""
        scope = self._scopes.get(name, _Scope())
        return {key: float(value) for key, value in scope.gauges.items()}

    def reset(self, name: str) -> None:
        """Forget what a scope has seen; an open scope stays open."""
        if name in self._scopes:
            self._scopes[name] = _Scope()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and gauges of this rank, in types that JSON has and gives back exactly."""
        return {
            name: {
                "sums": {key: float(value) for key, value in scope.sums.items()},
                "gauges": {key: float(value) for key, value in scope.gauges.items() if isfinite(value)},
            }
            for name, scope in self._scopes.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all sums and gauges by those of `state_dict`; open scopes stay open."""
        self._scopes = {name: _Scope() for name in self._open}
        for name, values in state.items():
            scope = self._scopes.setdefault(name, _Scope())
            scope.sums.update(values["sums"])
            scope.gauges.update(values["gauges"])

    def _listening(self) -> list[_Scope]:
        """Return the open scopes, each once."""
        return [self._scopes[name] for name in dict.fromkeys(self._open)]


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up the states of several ranks (`Metrics.state_dict`); the gauges are those of the first."""
    merged: dict[str, Any] = {}
    for state in states:
        for name, values in state.items():
            scope = merged.setdefault(name, {"sums": {}, "gauges": values["gauges"]})
            for key, value in values["sums"].items():
                scope["sums"][key] = scope["sums"].get(key, 0.0) + value
    return merged


def _keep(value: Tensor | float) -> Tensor | float:
    if not isinstance(value, Tensor):
        return float(value)
    assert value.numel() == 1, f"a metric must be one number, but has the shape {tuple(value.shape)}"
    # A copy, since the caller may change its tensor in place.
    return value.detach().reshape(()).to(sum_dtype(value.device), copy=True)


def _on_device(value: Tensor | float, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=sum_dtype(device), device=device)
