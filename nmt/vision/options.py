"""The options of image classification. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nmt.config.fields import key_of
from nmt.config.ranges import check_limits, check_ranges, limits
from nmt.errors import UserError, shown

LARGEST_SIDE = 4096  # pixels; a model for larger images would take gigabytes before any fault is found
SMALLEST_CROP = 1e-3

if TYPE_CHECKING:
    from nmt.vision.task import ImageClassificationTask


@dataclass(frozen=True)
class AugmentationOptions:
    """How training images are varied at random. Validation images are resized and cut at the centre."""

    crop: Literal["auto", "resized", "shift", "none"] = "auto"
    """resized: a part of random size and shape, brought to the image size; shift: moved by some pixels; none: as
    in validation; auto: resized for folders of files, shift for MNIST and CIFAR."""
    shift: int | None = field(default=None, metadata=limits(least=1))
    """Most pixels that `crop` shift moves an image by, left and right, up and down; an eighth of the image size
    unless given."""
    hflip: float | None = None
    """Probability that an image is mirrored; 0.5, and 0 for MNIST's digits, unless given."""
    rand_augment: int | None = None
    """Change each image by two random operations of RandAugment, of this strength (0 to 30)."""
    trivial_augment: bool = False
    """Change each image by one random operation of a random strength (TrivialAugment)."""
    auto_augment: Literal["none", "imagenet", "cifar10", "svhn"] = "none"
    """Change each image by two operations of the policy that AutoAugment found for these images."""
    random_erasing: float = 0.0
    """Probability that a random rectangle is painted in the mean colour."""
    mixup: float = 0.0
    """Blend images, and their labels, by a weight from Beta(a, a) with this a; 0 for no blending."""
    cutmix: float = 0.0
    """Paste a rectangle of another image, and that share of its label, likewise; where `mixup` is set too, each
    batch gets one of the two."""

    def check(self) -> None:
        """Raise `UserError` for values that make no sense."""
        check_limits(self)
        for name in ("hflip", "random_erasing"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"`{key_of(name)}` must be a probability from 0 to 1, but is {value}.")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) != 0:  # from 0.001 on the distribution is one in float32
                check_ranges(self, {name: (1e-3, 1e3)})
        if self.rand_augment is not None and not 0 <= self.rand_augment <= 30:
            raise UserError(f"`rand-augment` must be from 0 to 30, but is {self.rand_augment}.")
        given = [
            name
            for name, is_given in (
                ("rand-augment", self.rand_augment is not None),
                ("trivial-augment", self.trivial_augment),
                ("auto-augment", self.auto_augment != "none"),
            )
            if is_given
        ]
        if len(given) > 1:
            raise UserError(f"`{given[0]}` must be given without `{given[1]}`, but both are. Leave one out.")
        if self.shift is not None and self.crop in ("resized", "none"):
            raise UserError(f"`shift` must come with `crop` shift, but that is {self.crop}. Leave it out.")


@dataclass(frozen=True)
class ImageClassificationOptions:
    """Image classification: one label for each image."""

    train_defaults: ClassVar[Mapping[str, Any]] = {
        "batch_size": 128,
        "max_tokens": None,  # an image has no length
        "required_batch_size_multiple": 1,
        "min_batch_size": 2,  # batch norm
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 1e-4,
        "lr_scheduler": "cosine",
        "warmup_updates": 0,
        "max_epoch": 90,
        "best_checkpoint_metric": "accuracy",
    }
    """What the options of a training run are by default with this task."""

    train_dir: Path
    """Training images: a folder that holds a folder of image files for each class, or the files of
    MNIST or CIFAR."""
    val_dir: Path | None = None
    """Validation images, likewise; of the files of MNIST and CIFAR it takes the test part."""
    val_fraction: float = field(default=0.0, metadata=limits(least=0, below=1))
    """Instead of `val-dir`: hold out this share of the training images of each class for validation."""
    split_seed: int = 1
    """Which images `val-fraction` holds out."""
    model: str = field(default="timm/resnet18", metadata={"fixed": True})
    """The model: timm/NAME or torchvision/NAME. A bare NAME is looked for in timm, then in torchvision. Or one of
    your own, package.module:Class, a torch.nn.Module."""
    model_args: tuple[str, ...] = field(default=(), metadata={"fixed": True})
    """Arguments of the model's own, each as NAME=VALUE: drop_rate=0.1, or channels=[32,64]."""
    pretrained: bool = False
    """Begin with timm's weights for the model, downloaded unless they are in its cache already."""
    weights: Path | None = None
    """Begin with weights of yours: a safetensors file, one of torch.save, or a model folder. Those that fit by
    name and shape are taken, so a head for other classes is left out; the others are named."""
    image_size: int | None = field(default=None, metadata=limits(least=1, fixed=True))
    """Height and width in pixels that the model sees. Unless given: 224 for folders of files, for MNIST and CIFAR
    that of the images."""
    crop_pct: float | None = field(default=None, metadata=limits(above=0, most=1))
    """Share of an image's shorter side that is left at validation; 0.875 with `crop` resized and 1 otherwise
    unless given."""
    mean: tuple[float, ...] | None = None
    """What is subtracted from each channel, where white is 1. Unless given: ImageNet's means, or for MNIST and
    CIFAR those of the training images."""
    std: tuple[float, ...] | None = None
    """What each channel is divided by, likewise."""
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    max_bad_images: int = 0
    """How many images of a split may be damaged or missing: others take their place in training, and they do not
    count in validation. At the start of a run the head and the end of each file are looked at."""
    label_smoothing: float = field(default=0.0, metadata=limits(least=0, below=1))
    """Probability that is spread over all classes, in training alone."""

    def check(self) -> None:
        """Raise `UserError` for values that make no sense."""
        check_limits(self)
        if (self.val_dir is None) == (self.val_fraction == 0):
            fault = (
                "both are missing. Give one of them."
                if self.val_dir is None
                else "both are given. Leave one out, or set `val-fraction` to 0."
            )
            raise UserError(f"`val-dir` or `val-fraction` must be given, but {fault}")
        if self.pretrained and self.weights is not None:
            raise UserError("`weights` must be given without `pretrained`, but both are. Leave one out.")
        if self.max_bad_images < 0:
            raise UserError(f"`max-bad-images` must not be negative, but is {self.max_bad_images}.")
        check_ranges(self, {"image_size": (1, LARGEST_SIDE), "crop_pct": (SMALLEST_CROP, 1)})
        check_ranges(self, {"mean": (-1e6, 1e6), "std": (1e-6, 1e6)})
        if (self.mean is None) != (self.std is None):
            raise UserError("`mean` and `std` must be given together, but one of them is missing.")
        for argument in self.model_args:
            if "=" not in argument:
                raise UserError(f"`model-args` must be of the form NAME=VALUE, but one is {shown(argument)}.")

    def data_options(self, split: str) -> tuple[str, ...]:
        """Return the field that names the images of a split, for whoever has the model already."""
        return ("val_dir",) if split == "valid" and self.val_dir is not None else ("train_dir",)

    def build(self, assets: Path | None) -> ImageClassificationTask:
        """Make the task, with the classes of a model folder, or of the training images if there is none."""
        from nmt.vision.libraries import import_torchvision

        import_torchvision()  # says what to install where it is missing
        from nmt.vision.task import ImageClassificationTask

        return ImageClassificationTask(self, assets)
