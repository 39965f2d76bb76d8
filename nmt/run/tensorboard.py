"""A run for TensorBoard: the scalars of its reports, and the task's texts and images.

Needs the package tensorboard, which torch's writer uses. Only rank 0 writes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from nmt.task import Illustrations

_NO_SCALARS = ("update", "epoch")


class EventWriter:
    """Writes event files into a folder; events after an update can be made void."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is written yet."""
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def go_on_after(self, update: int) -> None:
        """Begin a file that goes on after an update; later events of the files before it are no longer shown."""
        self.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=update + 1)

    def report(self, kind: str, record: Mapping[str, Any]) -> None:
        """Write the numbers of a report, each as `kind/name`."""
        assert self._writer is not None, "call go_on_after first"
        for name, value in record.items():
            if isinstance(value, (int, float)) and name not in _NO_SCALARS:
                tag = f"{kind}/{name.replace('/', ' per ')}"  # a slash would open another group
                self._writer.add_scalar(tag, value, record["update"])

    def illustrate(self, update: int, illustrations: Illustrations) -> None:
        """Write texts and images."""
        assert self._writer is not None, "call go_on_after first"
        for name, text in illustrations.texts.items():
            self._writer.add_text(name, text, update)
        for name, image in illustrations.images.items():
            self._writer.add_image(name, image, update, dataformats="HWC")

    def flush(self) -> None:
        """Hand all that has been written to the operating system."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the file, if one is open."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
