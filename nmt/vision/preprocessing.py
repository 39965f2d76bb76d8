"""Turn stored images into the inputs of a model.

Legend: B images, C channels, H height, W width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmt.config.ranges import check_ranges
from nmt.errors import UserError
from nmt.vision.libraries import import_torchvision
from nmt.vision.options import LARGEST_SIDE, SMALLEST_CROP, AugmentationOptions

_LONGEST_SIDE = 16  # times the shorter side; more than the cut at the centre shows


@dataclass(frozen=True)
class ImageFormat:
    """The images that a model takes; saved with it."""

    num_channels: int
    image_size: int
    crop_pct: float
    """Share of an image's shorter side that the cut at the centre leaves."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        # As the options: what is saved must be read again, also if the size is that of the images.
        check_ranges(self, {"image_size": (1, LARGEST_SIDE), "crop_pct": (SMALLEST_CROP, 1)})
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.num_channels:
                raise UserError(
                    f"`{name}` must have a value for each channel, of which there are {self.num_channels}, but is "
                    f"{getattr(self, name)}."
                )


def centre(format_: ImageFormat) -> Any:
    """Return the transform of validation: an image -> (C, H, W) uint8, resized and cut at the centre."""
    v2 = import_torchvision().transforms.v2
    return v2.Compose([*_resize_and_cut(format_), v2.PILToTensor()])


def _resize_and_cut(format_: ImageFormat) -> list[Any]:
    """Return the steps that bring the shorter side to a size, and cut a square out of the centre."""
    v2 = import_torchvision().transforms.v2

    def cut_strip(image: Any) -> Any:
        # Without this, the longer side of a strip of 2 x 30,000 pixels would become millions of pixels long.
        height, width = v2.functional.get_size(image)
        longest = _LONGEST_SIDE * min(height, width)
        if max(height, width) <= longest:
            return image
        return v2.functional.center_crop(image, [min(height, longest), min(width, longest)])

    size = format_.image_size
    resize = v2.Resize(round(size / format_.crop_pct), antialias=True)
    return [v2.Lambda(cut_strip), resize, v2.CenterCrop(size)]


def augment(format_: ImageFormat, options: AugmentationOptions) -> Any:
    """Return the transform of training: an image -> (C, H, W) uint8; it draws from torch's global generator.

    Args:
        format_: The size and the mean colour.
        options: With `crop` and `hflip` already chosen.
    """
    v2 = import_torchvision().transforms.v2
    size = format_.image_size
    steps: list[Any] = []
    if options.crop == "resized":
        steps.append(v2.RandomResizedCrop(size, antialias=True))
    else:
        steps += _resize_and_cut(format_)
    if options.crop == "shift":
        steps.append(v2.RandomCrop(size, padding=options.shift or max(1, size // 8)))
    if options.hflip:
        steps.append(v2.RandomHorizontalFlip(options.hflip))
    if options.rand_augment is not None:
        steps.append(v2.RandAugment(magnitude=options.rand_augment))
    if options.trivial_augment:
        steps.append(v2.TrivialAugmentWide())
    if options.auto_augment != "none":
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy(options.auto_augment)))
    steps.append(v2.PILToTensor())
    if options.random_erasing:
        colour = [round(255 * value) for value in format_.mean]
        steps.append(v2.RandomErasing(options.random_erasing, value=colour))
    return v2.Compose(steps)


def mix(options: AugmentationOptions, num_classes: int) -> Any:
    """Return the transform of a training batch, or None: (images, labels) -> (images, (B, num_classes))."""
    v2 = import_torchvision().transforms.v2
    choices = []
    if options.mixup:
        choices.append(v2.MixUp(alpha=options.mixup, num_classes=num_classes))
    if options.cutmix:
        choices.append(v2.CutMix(alpha=options.cutmix, num_classes=num_classes))
    return v2.RandomChoice(choices) if choices else None


def normalize(images: Tensor, format_: ImageFormat) -> Tensor:
    """Return uint8 images as float32 with a mean of about 0 and a variance of about 1: (B, C, H, W)."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (format_.mean, format_.std))
    return images.float().div_(255).sub_(mean).div_(std)
