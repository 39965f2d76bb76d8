"""The examples of a split, and batches of them.

Legend: B images, C channels, H height, W width, N images of the split.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from nmt.vision.identity import fingerprint
from nmt.vision.options import AugmentationOptions
from nmt.vision.preprocessing import ImageFormat, augment, centre, mix, normalize
from nmt.vision.sources import ImageSource


@dataclass(frozen=True)
class ImageBatch:
    """Images with their labels."""

    images: Tensor
    """(B, C, H, W) float32, normalised."""
    labels: Tensor
    """(B,) int64; or (B, number of classes) float32, the weight of each, where images are blends."""

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.images)

    @property
    def num_targets(self) -> int:
        """B: the loss is a mean over images."""
        return len(self.images)

    def to(self, device: torch.device) -> Self:
        """Copy to a device, without waiting for the copy if it is from pinned memory."""
        return type(self)(*(part.to(device, non_blocking=True) for part in (self.images, self.labels)))

    def pin_memory(self) -> Self:
        """Copy to page-locked memory."""
        return type(self)(self.images.pin_memory(), self.labels.pin_memory())


class ImageExamples:
    """Images of a split, varied at random if they are for training.

    What is random is drawn from torch's global generator when an image is read and when a batch is made.
    """

    def __init__(
        self, source: ImageSource, format_: ImageFormat, augmentation: AugmentationOptions | None = None
    ) -> None:
        """Take images as they are stored.

        Args:
            source: The images. It pickles as its path, and the examples with it.
            format_: What the model sees.
            augmentation: How images are varied, with `crop` and `hflip` decided on; None for not at all.
        """
        self.source = source
        self.format = format_
        self.augmentation = augmentation
        self.sizes = np.ones((len(source), 1), dtype=np.int32)
        self._transform = centre(format_) if augmentation is None else augment(format_, augmentation)
        self._mix = None if augmentation is None else mix(augmentation, len(source.classes))

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageExamples, (self.source, self.format, self.augmentation)

    def fingerprint(self) -> str:
        """Return what tells these images from others (`nmt.vision.identity`)."""
        return fingerprint(self.source)

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, (C, H, W) uint8, and its label.

        Raises:
            UserError: The file is damaged.
        """
        return self._transform(self.source.image(index)), self.source.label(index)

    def collate(self, items: list[tuple[Tensor, int]]) -> ImageBatch:
        """Make a batch."""
        images = normalize(torch.stack([image for image, _ in items]), self.format)
        labels = torch.tensor([label for _, label in items])
        if self._mix is not None:
            images, labels = self._mix(images, labels)
        return ImageBatch(images, labels)
