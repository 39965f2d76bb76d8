"""Predictions of a trained model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.image_files import write_folders
from support.tiny_translation_model import write_tiny_model
from torch import nn

from nmt.checkpoints.model_folder import load_model
from nmt.cli.train import main
from nmt.errors import UserError
from nmt.vision.classifier import Classifier
from nmt.vision.preprocessing import ImageFormat

PLAIN = ImageFormat(num_channels=3, image_size=4, crop_pct=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class ByColour(nn.Module):
    """Scores the classes by how much red, green and blue there is in the left half."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * images[..., :2].mean(dim=(2, 3))


def classifier() -> Classifier:
    return Classifier(ByColour(), classes=["red", "green", "blue"], format_=PLAIN)


def coloured(*colours: tuple[int, int, int]) -> Image.Image:
    """Return an image with a column of each colour."""
    return Image.fromarray(np.array([colours] * len(colours), dtype=np.uint8))


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_each_image_gets_its_classes_in_order_whatever_the_batch(tmp_path: Path) -> None:
    coloured(GREEN, GREEN).save(tmp_path / "green.png")
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    images = [
        tmp_path / "green.png",
        str(tmp_path / "cut.jpg"),
        coloured(BLUE, BLUE),
        np.array(coloured(RED, RED)),
        tmp_path / "lost.png",
    ]
    for batch_size in (1, 2, 64):
        found = list(classifier().predict(iter(images), batch_size=batch_size))
        assert [prediction.label for prediction in found] == ["green", None, "blue", "red", None]
        assert [prediction.path for prediction in found] == [
            tmp_path / "green.png",
            tmp_path / "cut.jpg",
            None,
            None,
            tmp_path / "lost.png",
        ]
        likely, other = np.exp(4) / (np.exp(4) + 2), 1 / (np.exp(4) + 2)
        assert found[0].probability == pytest.approx(likely, rel=1e-5)
        assert [p for _, p in found[0].top] == pytest.approx([likely, other, other], rel=1e-5)
        assert found[1].probability is None and f"`{tmp_path / 'cut.jpg'}` must be an image" in str(
            found[1].error
        )
    assert [len(prediction.top) for prediction in classifier().predict(images, top=2)] == [2, 0, 2, 2, 0]
    assert list(classifier().predict([])) == []


def test_with_flips_it_is_the_mean_of_both_sides() -> None:
    (plain,) = classifier().predict([coloured(RED, GREEN)])
    (both,) = classifier().predict([coloured(RED, GREEN)], flips=True)
    (mirrored,) = classifier().predict([coloured(GREEN, RED)])
    assert plain.label == "red" and mirrored.label == "green"
    for name, probability in both.top:
        assert probability == pytest.approx((dict(plain.top)[name] + dict(mirrored.top)[name]) / 2, rel=1e-5)


def test_a_model_folder_predicts_as_its_task_validates(tmp_path: Path) -> None:
    train = write_folders(tmp_path / "train", {"red": 4, "blue": 4})
    valid = write_folders(tmp_path / "val", {"red": 3, "blue": 2})
    arguments = ["--task", "image_classification", "--model", "timm/test_byobnet", "--image-size", "32"]
    arguments += ["--batch-size", "4", "--max-epoch", "2", "--lr", "0.02", "--device", "cpu"]
    folders = ["--train-dir", str(train), "--val-dir", str(valid), "--save-dir", str(tmp_path / "run")]
    main([*arguments, *folders])
    loaded = Classifier.load(tmp_path / "run" / "checkpoints" / "last")
    assert loaded.classes == ("blue", "red")
    files = sorted(valid.glob("*/*.png"))
    model, task = load_model(tmp_path / "run" / "checkpoints" / "last")
    examples = task.open_split("valid")
    batch = examples.collate([examples[index] for index in range(5)])
    with torch.no_grad():
        expected = model(batch.images).softmax(dim=1)
    for prediction, row in zip(loaded.predict(files, batch_size=2), expected, strict=True):
        for name, probability in prediction.top:
            assert probability == pytest.approx(row[loaded.classes.index(name)].item(), rel=1e-4, abs=1e-6)


def test_a_model_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a model that classifies images"):
        Classifier.load(write_tiny_model(tmp_path / "model"))
