"""A place in the sequence of batches of all epochs. A checkpoint keeps it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nmt.data.batching import Cut, Window, num_windows
from nmt.data.limits import BatchLimits
from nmt.data.order import Order
from nmt.errors import DamagedError, UserError, counted


@dataclass(frozen=True)
class Position:
    """A place that is the same for all ranks, and for a later run with another number of them.

    The next batch is number `cuts[-1][1]` of the last cut of the window.
    """

    window: Window
    cuts: tuple[Cut, ...]
    """How this window has been cut so far, and the number of batches consumed of each cut."""
    examples_consumed: int
    """In this epoch."""

    def to_state(self, *, dataset_size: int) -> dict[str, Any]:
        """Return the position in JSON types; `from_state` compares `dataset_size`."""
        order = self.window.order
        return {
            "epoch": order.epoch,
            "window": self.window.number,
            "cuts": [[asdict(limits), num_consumed] for limits, num_consumed in self.cuts],
            "examples_consumed": self.examples_consumed,
            "seed": order.seed,
            "window_size": self.window.size,
            "dataset_size": dataset_size,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], order: Order, *, dataset_size: int) -> "Position":
        """Restore a position within an epoch.

        Args:
            state: From `to_state`.
            order: The order of the state's epoch, by the state's seed.
            dataset_size: The present number of examples.

        Raises:
            UserError: The number of examples was another.
        """
        if state["dataset_size"] != dataset_size:
            raise UserError(
                f"the training data must stay the same during an epoch, but epoch {state['epoch']} was begun "
                f"with {counted(state['dataset_size'], 'example')}, and now there are {dataset_size:,}. "
                "Resume with the data directory that the run was started with."
            )
        window = Window(order, state["window"], state["window_size"])
        if (
            window.number >= num_windows(order.num_places, window.size)
            or state["examples_consumed"] > order.num_places
        ):
            raise DamagedError(
                f"the place in the training data must lie within its {counted(dataset_size, 'example')}, but "
                "does not. Restore the checkpoint, or begin a new run."
            )
        cuts = tuple((BatchLimits.from_json(limits), consumed) for limits, consumed in state["cuts"])
        return cls(window, cuts, state["examples_consumed"])


def is_start_of_epoch(state: Mapping[str, Any]) -> bool:
    """Return whether nothing of the epoch of a saved position has been handed out."""
    return state["window"] == 0 and not any(num_consumed for _, num_consumed in state["cuts"])
