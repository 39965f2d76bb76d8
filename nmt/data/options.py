"""Options of the data pipeline."""

from dataclasses import dataclass

from nmt.errors import UserError


@dataclass(frozen=True)
class BatchingOptions:
    """How examples are gathered into batches, and batches into updates."""

    max_tokens: int | None = 4096
    """Largest size of a batch on one device: its number of examples times its longest side, padding included.
    Longer examples are left out of training and counted."""

    batch_size: int | None = None
    """Largest number of examples in a batch."""

    update_freq: int = 1
    """Number of batches per device that are summed into one update."""

    required_batch_size_multiple: int = 8
    """Where more than this many examples fit into a batch, their number is a multiple of it."""

    num_workers: int = 0
    """Number of processes per device that read and pad batches ahead. 0: the training process does it."""

    window_size: int = 2**20
    """Number of examples that are sorted by length together. A smaller data set is sorted as a whole."""

    def check(self) -> None:
        """Check what no single field can tell.

        Raises:
            UserError: a value is out of range, or no option limits the size of a batch.
        """
        if self.max_tokens is None and self.batch_size is None:
            raise UserError(
                "`max-tokens` or `batch-size` must be given, but both are missing. "
                "Set one of them: without it all examples would be one batch."
            )
        at_least_one = {
            "max-tokens": self.max_tokens,
            "batch-size": self.batch_size,
            "update-freq": self.update_freq,
            "required-batch-size-multiple": self.required_batch_size_multiple,
            "window-size": self.window_size,
        }
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise UserError(f"`{name}` must be at least 1, but is {value}. Give a larger number.")
        if self.num_workers < 0:
            raise UserError(
                f"`num-workers` must be at least 0, but is {self.num_workers}. "
                "Give 0 to read the data in the training process."
            )
