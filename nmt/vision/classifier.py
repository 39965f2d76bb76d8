"""A trained classifier: images in, classes and probabilities out, in order.

Legend: B images, N classes.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nmt.checkpoints.model_folder import load_model
from nmt.errors import UserError
from nmt.vision.image_files import UnreadableImage, read_image
from nmt.vision.preprocessing import ImageFormat, centre, normalize
from nmt.vision.task import ImageClassificationTask


@dataclass(frozen=True)
class Prediction:
    """The classes that a model gives to an image."""

    path: Path | None
    """The image file, if a file was given."""
    top: tuple[tuple[str, float], ...]
    """The likeliest classes with their probabilities, the likeliest first; none if the image cannot be read."""
    error: str | None = None
    """Why the image cannot be read."""

    @property
    def label(self) -> str | None:
        """The likeliest class."""
        return self.top[0][0] if self.top else None

    @property
    def probability(self) -> float | None:
        """Its probability."""
        return self.top[0][1] if self.top else None


class Classifier:
    """The model of a model folder, ready for images.

    >>> classifier = Classifier.load("RUN/checkpoints/best")
    >>> for prediction in classifier.predict(["ant.jpg", "bee.jpg"]):
    ...     print(prediction.path, prediction.label, prediction.probability)
    """

    def __init__(self, model: nn.Module, *, classes: Sequence[str], format_: ImageFormat) -> None:
        """Take a model.

        Args:
            model: (B, channels, size, size) -> (B, N) scores.
            classes: The names of the N classes.
            format_: The images that the model takes.
        """
        self.model = model.eval()
        self.classes = tuple(classes)
        self.format = format_
        self._transform = centre(format_)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Self:
        """Load a model folder.

        Raises:
            UserError: It is not a model folder, or its model does not classify images.
        """
        task: Any
        model, task = load_model(Path(folder), device)
        if not isinstance(task, ImageClassificationTask):
            raise UserError(f"`{folder}` must be a model that classifies images, but is none. Name another.")
        return cls(model, classes=task.classes, format_=task.format)

    def predict(
        self, images: Iterable[Any], *, top: int = 5, batch_size: int = 64, flips: bool = False
    ) -> Iterator[Prediction]:
        """Yield a prediction for each image, in the order of the images.

        Args:
            images: Files, Pillow images, or arrays: (H, W) or (H, W, 3) uint8.
            top: Number of classes to give for each.
            batch_size: How many images to take at once.
            flips: Whether to take the mean of the probabilities of each image and its mirror image.
        """
        waiting = iter(images)
        while batch := list(islice(waiting, batch_size)):
            read = [self._read(image) for image in batch]
            tensors = [tensor for tensor in read if isinstance(tensor, Tensor)]
            probabilities = iter(self._probabilities(torch.stack(tensors), flips=flips) if tensors else ())
            for image, found in zip(batch, read, strict=True):
                path = Path(image) if isinstance(image, str | os.PathLike) else None
                if isinstance(found, str):
                    yield Prediction(path, (), found)
                    continue
                values, places = next(probabilities).topk(min(top, len(self.classes)))
                names = (self.classes[place] for place in places.tolist())
                yield Prediction(path, tuple(zip(names, values.tolist(), strict=True)))

    def _read(self, image: Any) -> Tensor | str:
        """Return the image for the model, (C, H, W) uint8, or the reason why it cannot be read."""
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        elif not isinstance(image, Image.Image):
            try:
                image = read_image(Path(image))
            except UnreadableImage as error:
                return str(error)
        seen: Any = self._transform(image.convert("L" if self.format.num_channels == 1 else "RGB"))
        assert isinstance(seen, Tensor)
        return seen

    @torch.inference_mode()
    def _probabilities(self, images: Tensor, *, flips: bool) -> Tensor:
        """Return the probabilities of all classes, on the CPU: (B, C, H, W) uint8 -> (B, N)."""
        weight = next(self.model.parameters())
        seen = normalize(images, self.format).to(weight.device, weight.dtype)
        probabilities = self.model(seen).float().softmax(dim=1)
        if flips:
            probabilities = (probabilities + self.model(seen.flip(3)).float().softmax(dim=1)) / 2
        return probabilities.cpu()
