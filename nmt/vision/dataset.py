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
"""The label of an image in a batch that cannot be read; `cross_entropy` ignores it."""


@dataclass(frozen=True)
class ImageBatch:
    """Images with their labels."""

    images: Tensor
    """(B, C, H, W) float32, normalised."""
    labels: Tensor
    """(B,) int64, or `UNREADABLE`. If images are blended: (B, number of classes) float32, the share of each."""

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.images)

    @property
    def num_targets(self) -> int:
        """B without the unreadable images: the number of images that the loss is a mean over."""
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

    Random numbers come from torch's global generator, when an image is read and when a batch is made.

    Up to `max_unreadable` images may be unreadable. In training other images take their place; in validation they
    do not count. The limit holds for each process that reads. A process begins with those in `unreadable`.
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
            source: The images. It is pickled as its path, and so are the examples.
            format_: The images that the model takes.
            augmentation: How images are varied, with `crop` and `hflip` already chosen; None for not at all.
            classes: The classes of the model: all those of the images, and perhaps more. None for just those.
            max_unreadable: How many images may be unreadable.
            unreadable: Images that are known to be unreadable.
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
        """Return a hash that identifies these images (`nmt.vision.identity`)."""
        return fingerprint(self.source)

    def notes(self) -> list[str]:
        """Return lines on files that are left out, and on classes without images (`nmt.vision.notes`)."""
        return describe_images(self.source, self.classes)

    def folders(self) -> list[Path]:
        """Return the folders in which a new folder would become a class, or a new image an example."""
        if not isinstance(self.source, FolderImages):
            return []
        path = self.source.path
        return [path, *(path / name for name in self.source.classes)]  # which may be links to elsewhere

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.source)

    def label(self, index: int) -> int:
        """Return the label of an image: the number of its class in the model."""
        return self._labels[self.source.label(index)]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, (C, H, W) uint8, and its label; `UNREADABLE` if the image cannot be read.

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
        """Yield an image, and in training also the next images, which may take its place."""
        if self.augmentation is None:
            return (index,)
        return (place % len(self) for place in range(index, index + len(self)))

    def _note_unreadable(self, index: int, error: UnreadableImage) -> None:
        """Remember an unreadable image; raise `UserError` if there are too many."""
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
    """Examples that a reading process cannot open.

    The error is raised when an example is asked for, so that it reaches the user. An error while they are opened
    would end the process.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __getitem__(self, index: int) -> Any:
        raise UserError(self.text)
