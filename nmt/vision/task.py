"""The image-classification task: classes, data, model, loss, accuracy.

Legend: B images, C classes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmt.config.records import ListOf, Number, Record, Whole, read_limited, read_record
from nmt.config.untold import is_untold
from nmt.distributed import World
from nmt.errors import DamagedError, UserError
from nmt.system.prepared_shapes import keep_prepared_shapes
from nmt.task import Illustrations, LossOutput
from nmt.task_extras import Words
from nmt.vision.dataset import UNREADABLE, ImageBatch, ImageExamples
from nmt.vision.held_out import divide, draw, read_split, write_split
from nmt.vision.libraries import import_timm
from nmt.vision.look_over import look_at_files
from nmt.vision.models import build_model, find_model
from nmt.vision.notes import named
from nmt.vision.options import (
    LARGEST_SIDE,
    SMALLEST_CROP,
    AugmentationOptions,
    ImageClassificationOptions,
)
from nmt.vision.own_weights import take_weights
from nmt.vision.pictures import draw_confusion, draw_predictions
from nmt.vision.preprocessing import ImageFormat
from nmt.vision.sources import FolderImages, ImageSource, StoredImages, open_images

CLASSES, FORMAT = "classes.txt", "images.json"
_TAKE_AGAIN = "Take the whole model folder again."
_FORMAT = Record(
    {
        "num_channels": Whole(1, 1024),
        "image_size": Whole(1, LARGEST_SIDE),
        "crop_pct": Number(SMALLEST_CROP, 1.0),
        "mean": ListOf(Number(-1e6, 1e6)),
        "std": ListOf(Number(1e-6, 1e6)),
    }
)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WEIGHTS_OF_TIMM = "checkpoint_path="
_NUM_SHOWN = 24
_NUM_AT_ONCE = 128
_FOLDER_IMAGE_SIZE = 224
_RESIZED_CROP_PCT = 0.875  # because training cuts parts out and enlarges them, so objects look larger there


class ImageClassificationTask:
    """One label for each image."""

    words = Words(target="image", examples="images")

    def __init__(self, options: ImageClassificationOptions, assets: Path | None) -> None:
        """Take classes and format from a model folder, or else from the training images."""
        keep_prepared_shapes(256)  # of each layer, forward and backward
        self.options = options
        self.is_new = assets is None
        self.is_pretrained = options.pretrained and assets is None  # a model folder has its own weights
        self.own_weights = options.weights if assets is None else None
        self.about_weights: list[str] = []
        self.held_out: list[str] | None = None
        """The names of the training images that are held out for validation."""
        self.train_images: FolderImages | StoredImages | None = None
        if assets is None:
            train_images = open_images(options.train_dir, "train")
            self.train_images = train_images
            self.classes = train_images.classes
            self.format = _settle_format(options, train_images)
            if options.val_fraction:
                self.held_out = draw(train_images, options.val_fraction, seed=options.split_seed)
        else:
            self.classes, self.format = _load_assets(assets)
            self.held_out = read_split(assets) if options.val_fraction else None
        self.metrics: Mapping[str, Literal["min", "max"]] = {"loss": "min", "accuracy": "max"}
        if len(self.classes) > 5:
            self.metrics = {**self.metrics, "top5": "max"}

    def build_model(self) -> nn.Module:
        """Return the model of the options: freshly initialised, with timm's weights, or with those of a file."""
        arguments = self.options.model_args
        if not self.is_new:  # a model folder already has the weights of such files, and the files may be gone
            arguments = tuple(
                text for text in arguments if not is_untold(text) and not text.startswith(_WEIGHTS_OF_TIMM)
            )
        model = build_model(
            self.options.model,
            arguments,
            num_classes=len(self.classes),
            num_channels=self.format.num_channels,
            image_size=self.format.image_size,
            is_pretrained=self.is_pretrained,
        )
        if self.own_weights is not None:
            self.about_weights = [take_weights(model, self.own_weights)]
        return model

    def open_split(self, split: str) -> ImageExamples:
        """Open "train" or "valid".

        Raises:
            UserError: Something is wrong with the images, or some have classes that the model does not have.
        """
        if split == "train":
            images = self.train_images or open_images(self.options.train_dir, "train")
            if self.held_out is not None:
                images = images.part(divide(images, self.held_out)[0])
            _check_same_classes(images, self.classes, self.format, flag="train-dir")
            return self._examples(images, _settle_augmentation(self.options.augmentation, images))
        if split == "valid":
            if self.options.val_dir is not None:
                images = open_images(self.options.val_dir, "valid")
            else:
                images = self.train_images or open_images(self.options.train_dir, "train")
                images = images.part(divide(images, self.held_out or [])[1])
            _check_same_classes(images, self.classes, self.format, flag="val-dir")
            return self._examples(images)
        raise UserError(
            f"The split must be train or valid, but is {split}: there is no option that names another."
        )

    def _examples(
        self, images: ImageSource, augmentation: AugmentationOptions | None = None
    ) -> ImageExamples:
        return ImageExamples(
            images,
            self.format,
            augmentation,
            classes=self.classes,
            max_unreadable=self.options.max_bad_images,
        )

    def look_over(self, train: ImageExamples, valid: ImageExamples, world: World) -> list[str]:
        """Return what a user should know about the images; look for files that cannot be read.

        Raises:
            UserError: There are more than `max-bad-images` of them.
        """
        lines = list(self.about_weights)
        for examples, split in ((train, "training"), (valid, "validation")):
            lines += look_at_files(examples, split=split, world=world)
        return lines

    def compute_loss(self, model: nn.Module, batch: ImageBatch) -> LossOutput:
        """Return the cross-entropy summed over images, label-smoothed in training, and counts of right labels."""
        scores = self._scores(model, batch)  # (B, C)
        if not isinstance(scores, Tensor):
            raise UserError(
                f"`model` must return scores alone, but {self.options.model} returns {type(scores).__name__} in "
                "training. If it has auxiliary outputs, leave them out by `model-args`: aux_logits=false."
            )
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        is_blend = batch.labels.is_floating_point()
        labels = batch.labels.to(scores.dtype) if is_blend else batch.labels
        smoothing = self.options.label_smoothing if model.training else 0.0
        loss = F.cross_entropy(scores, labels, reduction="sum", label_smoothing=smoothing)
        best_label = labels.argmax(dim=1) if is_blend else labels
        sums = {"correct": (scores.argmax(dim=1) == best_label).sum()}
        if "top5" in self.metrics:
            sums["correct5"] = (scores.topk(5, dim=1).indices == best_label[:, None]).sum()
        return LossOutput(loss, sums)

    def _scores(self, model: nn.Module, batch: ImageBatch) -> Any:
        try:
            return model(batch.images.to(_weight_dtype(model)))
        except ValueError as error:
            if len(batch.images) > 1 or "Expected more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"`batch-size` and `min-batch-size` must be at least 2 for `{self.options.model}` and images of "
                f"{self.format.image_size} pixels, but a batch has one image: of its channels batch norm sees one "
                "value each. Raise them, or `image-size`."
            ) from error

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the loss an image (nats), and the shares of images with the right label first, or in five."""
        num_images = max(sums["num_targets"], 1.0)
        results = {"loss": sums["loss"] / num_images, "accuracy": sums["correct"] / num_images}
        if "top5" in self.metrics:
            results["top5"] = sums["correct5"] / num_images
        return results

    def evaluate(self, model: nn.Module, examples: ImageExamples, world: World) -> dict[str, float]:
        """Return nothing, because all metrics are ratios of sums."""
        return {}

    @torch.no_grad()
    def illustrate(self, model: nn.Module, examples: ImageExamples, world: World) -> Illustrations:
        """Show some images, evenly spread over the split, with their labels, and the confusion matrix of all."""
        share = range(world.rank, len(examples), world.size)
        guesses = world.gather(self._predict(model, examples, share, world))
        if not world.is_main:
            return Illustrations()
        predicted = np.empty(len(examples), dtype=np.int64)
        for rank, part in enumerate(guesses):
            predicted[rank :: world.size] = part
        labels = np.array([examples.label(index) for index in range(len(examples))])
        counts = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        is_readable = predicted >= 0
        np.add.at(counts, (labels[is_readable], predicted[is_readable]), 1)
        readable = np.flatnonzero(is_readable)
        shown = np.unique(readable[np.linspace(0, len(readable) - 1, _NUM_SHOWN).astype(np.int64)]).tolist()
        images = np.stack([examples[index][0].numpy() for index in shown])
        return Illustrations(
            images={
                "predictions": draw_predictions(images, labels[shown], predicted[shown], self.classes),
                "confusion": draw_confusion(counts, self.classes),
            }
        )

    def _predict(self, model: nn.Module, examples: ImageExamples, indices: range, world: World) -> list[int]:
        """Return the label that the model gives each of some images; -1 for those that cannot be read."""
        predicted: list[int] = []
        for start in range(0, len(indices), _NUM_AT_ONCE):
            batch = examples.collate([examples[index] for index in indices[start : start + _NUM_AT_ONCE]])
            scores = model(batch.images.to(world.device, _weight_dtype(model)))
            guesses = scores.argmax(dim=1).cpu()
            predicted += guesses.where(batch.labels != UNREADABLE, -1).tolist()
        return predicted

    def save_assets(self, folder: Path) -> None:
        """Write the names of the classes, in the order of the scores, and the images that the model takes."""
        (folder / CLASSES).write_text("".join(f"{name}\n" for name in self.classes), encoding="utf-8")
        if self.held_out is not None:
            write_split(folder, self.held_out, self.classes)
        (folder / FORMAT).write_text(json.dumps(asdict(self.format), indent=1) + "\n", encoding="utf-8")


def _load_assets(folder: Path) -> tuple[list[str], ImageFormat]:
    """Read what `save_assets` wrote."""
    for name in (CLASSES, FORMAT):
        if not (folder / name).is_file():
            raise UserError(f"`{folder / name}` must be a file of the model folder, but is missing.")
    try:
        text = read_limited(folder / CLASSES).decode("utf-8-sig").replace("\r\n", "\n")
        classes = text.removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise DamagedError(f"`{folder / CLASSES}` must be UTF-8, but is not. {_TAKE_AGAIN}") from None
    record: dict[str, Any] = read_record(folder / FORMAT, _FORMAT, what_to_do=_TAKE_AGAIN)
    return classes, ImageFormat(
        num_channels=record["num_channels"],
        image_size=record["image_size"],
        crop_pct=record["crop_pct"],
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
    )


def _settle_augmentation(options: AugmentationOptions, images: ImageSource) -> AugmentationOptions:
    """Choose what is not given: small images of one size are moved, others are cut; digits are not mirrored."""
    crop = options.crop
    if crop == "auto":
        crop = "shift" if isinstance(images, StoredImages) else "resized"
    hflip = options.hflip
    if hflip is None:
        hflip = 0.0 if isinstance(images, StoredImages) and not images.may_be_mirrored else 0.5
    settled = replace(options, crop=crop, hflip=hflip)
    settled.check()
    return settled


def _settle_format(options: ImageClassificationOptions, images: ImageSource) -> ImageFormat:
    """Choose the options of the image format that are not given."""
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    image_size = _FOLDER_IMAGE_SIZE
    if isinstance(images, StoredImages):
        mean, std, image_size = images.mean(), images.std(), images.image_size
    elif options.pretrained:
        mean, std = _of_weights(options.model)
    crop = _settle_augmentation(options.augmentation, images).crop
    return ImageFormat(
        num_channels=images.num_channels,
        image_size=options.image_size or image_size,
        crop_pct=options.crop_pct or (_RESIZED_CROP_PCT if crop == "resized" else 1.0),
        mean=options.mean or mean,
        std=options.std or std,
    )


def _of_weights(model: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the means and standard deviations that timm's weights of a model were trained with."""
    library, name = find_model(model)
    config = import_timm().get_pretrained_cfg(name) if library == "timm" else None
    if config is None:
        return _IMAGENET_MEAN, _IMAGENET_STD  # missing weights are reported when the model is made
    return tuple(config.mean), tuple(config.std)


def _check_same_classes(images: ImageSource, classes: list[str], format_: ImageFormat, *, flag: str) -> None:
    """Refuse images of classes that the model does not learn. Classes without images are allowed."""
    others = [name for name in images.classes if name not in classes]
    if others:
        raise UserError(
            f"`{flag}` must have no other than the {len(classes):,} classes that the model learns, but "
            f"`{images.path}` has {named(others)}. Take the folders away, or train a new model with them."
        )
    if images.num_channels != format_.num_channels:
        raise UserError(
            f"`{flag}` must have images of {format_.num_channels} channels, but those in `{images.path}` have "
            f"{images.num_channels}. Name other images."
        )


def _weight_dtype(model: nn.Module) -> torch.dtype:
    """Return the type that the model computes in: the type of its first weight matrix or kernel."""
    return next((p.dtype for p in model.parameters() if p.ndim >= 2 and p.is_floating_point()), torch.float32)
