"""The examples of a split, and batches of them.

Legend: B images, C channels, H height, W width, N images of the split.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from nmt.errors import UserError
from nmt.vision.folders import FolderImages
from nmt.vision.identity import fingerprint
from nmt.vision.image_files import UnreadableImage
from nmt.vision.notes import describe_images
from nmt.vision.options import AugmentationOptions
from nmt.vision.preprocessing import ImageFormat, augment, centre, mix, normalize
from nmt.vision.sources import ImageSource

UNREADABLE = -100
"""The label of a place in a batch whose image cannot be read: `cross_entropy` passes it over."""


@dataclass(frozen=True)
class ImageBatch:
    """Images with their labels."""

    images: Tensor
    """(B, C, H, W) float32, normalised."""
    labels: Tensor
    """(B,) int64, or `UNREADABLE`; or (B, number of classes) float32, shares of each, where images are blends."""

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.images)

    @property
    def num_targets(self) -> int:
        """B without the unreadable ones: the loss is a mean over images."""
        if self.labels.is_floating_point():
            return len(self.images)
        return int((self.labels != UNREADABLE).sum())

    def to(self, device: torch.device) -> Self:
        """Copy to a device, without waiting for the copy if it is from pinned memory."""
        return type(self)(*(part.to(device, non_blocking=True) for part in (self.images, self.labels)))

    def pin_memory(self) -> Self:
        """Copy to page-locked memory."""
        return type(self)(self.images.pin_memory(), self.labels.pin_memory())


class ImageExamples:
    """Images of a split, varied at random if they are for training.

    What is random is drawn from torch's global generator when an image is read and when a batch is made.

    Of up to `max_unreadable` images that cannot be read others take the place in training; in validation they do
    not count. It is a limit for each process that reads, which knows those that `unreadable` has when it starts.
    """

    def __init__(
        self,
        source: ImageSource,
        format_: ImageFormat,
        augmentation: AugmentationOptions | None = None,
        *,
        classes: list[str] | None = None,
        max_unreadable: int = 0,
        unreadable: Iterable[int] = (),
    ) -> None:
        """Take images as they are stored.

        Args:
            source: The images. It pickles as its path, and the examples with it.
            format_: What the model sees.
            augmentation: How images are varied, with `crop` and `hflip` decided on; None for not at all.
            classes: The classes of the model, all of those that the images have and perhaps more; theirs if None.
            max_unreadable: How many images may be such that they cannot be read.
            unreadable: Those that are known to be.
        """
        self.source = source
        self.format = format_
        self.augmentation = augmentation
        self.classes = source.classes if classes is None else classes
        self.max_unreadable = max_unreadable
        self.unreadable = set(unreadable)
        self.sizes = np.broadcast_to(np.int32(1), (len(source), 1))  # one number, however many images
        self._labels = [self.classes.index(name) for name in source.classes]
        self._transform = centre(format_) if augmentation is None else augment(format_, augmentation)
        self._mix = None if augmentation is None else mix(augmentation, len(self.classes))

    def __reduce__(self) -> tuple[Any, ...]:
        settings = {
            "classes": self.classes,
            "max_unreadable": self.max_unreadable,
            "unreadable": sorted(self.unreadable),
        }
        return _reopen, (self.source.__reduce__(), self.format, self.augmentation, settings)

    def fingerprint(self) -> str:
        """Return what tells these images from others (`nmt.vision.identity`)."""
        return fingerprint(self.source)

    def notes(self) -> list[str]:
        """Return lines on what is left out, and on classes without images (`nmt.vision.notes`)."""
        return describe_images(self.source, self.classes)

    def folders(self) -> list[Path]:
        """Return the folders in which each folder would be a class, and each image one of its class."""
        if not isinstance(self.source, FolderImages):
            return []
        path = self.source.path
        return [path, *(path / name for name in self.source.classes)]  # which may be links to elsewhere

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.source)

    def label(self, index: int) -> int:
        """Return the label of an image, a place among the classes of the model."""
        return self._labels[self.source.label(index)]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, (C, H, W) uint8, and its label: `UNREADABLE` where there is none to be had.

        Raises:
            UserError: The file is damaged.
        """
        for place in self._stand_ins(index):
            if place in self.unreadable:
                continue
            try:
                return self._transform(self.source.image(place)), self.label(place)
            except UnreadableImage as error:
                self._note_unreadable(place, error)
        size = self.format.image_size
        return torch.zeros(self.format.num_channels, size, size, dtype=torch.uint8), UNREADABLE

    def _stand_ins(self, index: int) -> Iterable[int]:
        """Yield an image, and in training those that may stand in for it: the next ones."""
        if self.augmentation is None:
            return (index,)
        return (place % len(self) for place in range(index, index + len(self)))

    def _note_unreadable(self, index: int, error: UnreadableImage) -> None:
        """Raise `UserError` if there are too many."""
        self.unreadable.add(index)
        count = len(self.unreadable)
        if count > self.max_unreadable:
            raise UserError(f"{error} {remedy(count)}") from error
        print(f"left out: {error}", file=sys.stderr)

    def collate(self, items: list[tuple[Tensor, int]]) -> ImageBatch:
        """Make a batch."""
        images = normalize(torch.stack([image for image, _ in items]), self.format)
        labels = torch.tensor([label for _, label in items])
        if self._mix is not None:
            images, labels = self._mix(images, labels)
        return ImageBatch(images, labels)


def remedy(num_unreadable: int) -> str:
    """Say what can be done about images that cannot be read."""
    what = "it" if num_unreadable == 1 else "them"
    return f"Restore {what}, or have {what} left out by `max-bad-images` {num_unreadable}."


def _reopen(source: tuple[Any, ...], format_: Any, augmentation: Any, settings: dict[str, Any]) -> Any:
    """Open examples in another process."""
    try:
        return ImageExamples(source[0](*source[1]), format_, augmentation, **settings)
    except UserError as error:
        return _Lost(str(error))


class _Lost:
    """Examples that cannot be opened in a process that is to read them.

    It says so when one is asked for, whence it gets to the user; an error in opening them would end the process.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __getitem__(self, index: int) -> Any:
        raise UserError(self.text)
