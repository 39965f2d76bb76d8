"""The task itself: loss, metrics, models by name, what is saved with a model, pictures; and its libraries."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.image_files import bars, write_folders, write_idx
from torch import nn

from nmt.distributed import single
from nmt.errors import UserError
from nmt.vision.dataset import ImageBatch
from nmt.vision.models import build_model, find_model
from nmt.vision.options import AugmentationOptions, ImageClassificationOptions
from nmt.vision.pictures import MOST_CLASSES, draw_confusion, draw_predictions, most_confused
from nmt.vision.preprocessing import ImageFormat
from nmt.vision.task import ImageClassificationTask

CPU = single(torch.device("cpu"))
SMALL = "timm/test_byobnet"


@pytest.fixture
def colours(tmp_path: Path) -> ImageClassificationOptions:
    train = write_folders(tmp_path / "train", {"red": 4, "green": 3, "blue": 3})
    valid = write_folders(tmp_path / "val", {"red": 2, "green": 2, "blue": 1})
    return ImageClassificationOptions(train_dir=train, val_dir=valid, model=SMALL, image_size=32)


def scoring_task(num_classes: int, **options: Any) -> ImageClassificationTask:
    """Return the task for this many classes without any data."""
    task = object.__new__(ImageClassificationTask)
    task.options = ImageClassificationOptions(train_dir=Path(), val_dir=Path(), **options)
    task.classes = [str(label) for label in range(num_classes)]
    task.metrics = {"loss": "min", "accuracy": "max"} | ({"top5": "max"} if num_classes > 5 else {})
    return task


class Given(nn.Module):
    """Scores that are given instead of computed: the image is the scores."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def test_the_loss_is_the_summed_cross_entropy_and_the_sums_count_what_is_right() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 3.0, 2.0]])
    labels = torch.tensor([0, 1, 1])
    output = scoring_task(3).compute_loss(Given(), ImageBatch(scores, labels))
    expected = -sum(row.log_softmax(0)[label] for row, label in zip(scores, labels, strict=True))
    torch.testing.assert_close(output.loss, expected)
    assert {name: value.item() for name, value in output.sums.items()} == {"correct": 2}


def test_labels_are_smoothed_in_training_alone() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    batch = ImageBatch(scores, torch.tensor([0]))
    task = scoring_task(4, label_smoothing=0.2)
    log_probabilities = scores[0].log_softmax(0)
    smoothed = -(0.8 * log_probabilities[0] + 0.2 * log_probabilities.mean())
    torch.testing.assert_close(task.compute_loss(Given().train(), batch).loss, smoothed)
    torch.testing.assert_close(task.compute_loss(Given().eval(), batch).loss, -log_probabilities[0])


def test_a_blend_is_scored_by_its_shares_and_is_right_by_its_larger_one() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, 1.0]])
    shares = torch.tensor([[0.75, 0.25, 0.0], [0.6, 0.4, 0.0]])
    output = scoring_task(3).compute_loss(Given(), ImageBatch(scores, shares))
    torch.testing.assert_close(output.loss, -(shares * scores.log_softmax(1)).sum())
    assert output.sums["correct"] == 1


def test_the_first_five_count_where_there_are_more_classes() -> None:
    scores = torch.arange(7.0).repeat(3, 1)  # the last class first
    task = scoring_task(7)
    output = task.compute_loss(Given(), ImageBatch(scores, torch.tensor([6, 2, 1])))
    assert (output.sums["correct"].item(), output.sums["correct5"].item()) == (1, 2)
    summary = task.summarize({"loss": 6.0, "correct": 1.0, "correct5": 2.0, "num_targets": 3.0})
    assert summary == {"loss": 2.0, "accuracy": 1 / 3, "top5": 2 / 3}
    assert set(scoring_task(5).metrics) == {"loss", "accuracy"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_are_cast_to_the_type_of_the_weights_and_the_loss_is_no_coarser_than_float32(
    dtype: torch.dtype,
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).to(dtype)
    images = torch.arange(8.0).view(2, 1, 2, 2)
    output = scoring_task(3).compute_loss(model, ImageBatch(images, torch.tensor([0, 2])))
    assert output.loss.dtype == (torch.float32 if dtype == torch.bfloat16 else torch.float64)


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18", "resnet18", "squeezenet1_1"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_model_is_built_by_name_for_the_channels_and_classes(name: str, num_channels: int) -> None:
    model = build_model(name, num_classes=4, num_channels=num_channels, image_size=32)
    assert model.training
    assert model(torch.randn(2, num_channels, 32, 32)).shape == (2, 4)
    assert (find_model(name)[0] == "timm") == (name in ("timm/resnet18", "resnet18"))


def test_model_arguments_are_the_models_own() -> None:
    model = build_model(
        "timm/resnet10t", ["channels=[8,8,16,16]"], num_classes=2, num_channels=1, image_size=28
    )
    assert model.fc.in_features == 16  # type: ignore[union-attr]


def model_refusal(name: str, arguments: list[str] | None = None, **changes: Any) -> str:
    settings = {"num_classes": 4, "num_channels": 3, "image_size": 32, **changes}
    with pytest.raises(UserError) as caught:
        build_model(name, arguments or [], **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_that_does_not_exist_or_fit_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = model_refusal("resnet_18")
    assert "but is 'resnet_18'" in text and "timm/resnet18" in text and "torchvision/resnet18" in text
    assert "must be a model of torchvision, but is" in model_refusal("torchvision/resnet10t")
    assert "must be timm/NAME or torchvision/NAME" in model_refusal("keras/resnet18")
    assert "`model-args` must be arguments that `resnet18` takes" in model_refusal("resnet18", ["colour=red"])
    missing = model_refusal("timm/resnet10t", ["checkpoint_path=none.pt"])
    assert "`model-args` must be arguments that `timm/resnet10t` takes" in missing
    assert "must have values in YAML" in model_refusal("resnet18", ["drop_rate=[1"])
    assert "must take images of 3x32x32, but `timm/vit_tiny_patch16_224` says" in model_refusal(
        "timm/vit_tiny_patch16_224"
    )
    for library in ("timm", "torchvision"):
        text = model_refusal(f"{library}/resnet18", ["num_classes=7"])
        assert f"must return 4 scores for an image, but `{library}/resnet18` returns the shape (1, 7)" in text
    assert "must come with a model of timm" in model_refusal("torchvision/resnet18", is_pretrained=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "must be in timm's cache or within reach" in model_refusal(
        "timm/test_byobnet.r160_in1k", is_pretrained=True
    )


OWN_MODEL = """
from torch import nn

class Small(nn.Module):
    def __init__(self, num_classes, in_channels=3, width=4):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

    def forward(self, images):
        return self.layers(images)

def function():
    raise AssertionError("must not be called")
"""


def test_a_model_of_ones_own_is_named_by_its_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colours: ImageClassificationOptions
) -> None:
    (tmp_path / "own_model_of_a_test.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    path_before = list(sys.path)
    name = "own_model_of_a_test:Small"
    model = build_model(name, ["width=7"], num_classes=4, num_channels=1, image_size=9)
    assert model(torch.zeros(2, 1, 9, 9)).shape == (2, 4)
    assert [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)] == [7]
    task = replace(colours, model=name).build(None)
    assert task.build_model()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    for other, text in (
        ("own_model_of_a_test:Large", "cannot: AttributeError"),
        ("own_model_of_a_test:function", "must be a class of torch.nn.Module"),
        ("os:system", "must be a class of torch.nn.Module"),
        ("no_such_package:Small", "cannot: ModuleNotFoundError"),
        ("torch.nn:Identity", "must return 4 scores for an image"),
    ):
        assert text in model_refusal(other)
    assert "must be arguments that `own_model_of_a_test:Small` takes" in model_refusal(name, ["depth=3"])
    assert "must come with a model of timm" in model_refusal(name, is_pretrained=True)
    assert sys.path == path_before


def test_a_model_with_auxiliary_outputs_is_refused_in_a_line() -> None:
    model = build_model(
        "torchvision/googlenet", ["init_weights=false"], num_classes=3, num_channels=3, image_size=64
    )
    batch = ImageBatch(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="must return scores alone"):
        scoring_task(3).compute_loss(model, batch)


def test_what_is_saved_with_a_model_suffices_to_build_it(
    colours: ImageClassificationOptions, tmp_path: Path
) -> None:
    task = colours.build(None)
    task.save_assets(tmp_path)
    assert (tmp_path / "classes.txt").read_text() == "blue\ngreen\nred\n"
    colours.train_dir.rename(tmp_path / "gone")
    again = colours.build(tmp_path)
    assert again.classes == task.classes == ["blue", "green", "red"] and again.format == task.format
    assert again.build_model()(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    (tmp_path / "images.json").write_text("{")
    with pytest.raises(UserError, match=r"images\.json must be complete JSON"):
        colours.build(tmp_path)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"classes\.txt` must be a file of the model folder"):
        colours.build(tmp_path)


def test_other_classes_are_refused_by_name(colours: ImageClassificationOptions, tmp_path: Path) -> None:
    task = colours.build(None)
    task.save_assets(tmp_path)
    (colours.val_dir / "red").rename(colours.val_dir / "pink")
    with pytest.raises(UserError, match=r"`val-dir` must have no other than the 3 classes .* has `pink`"):
        task.open_split("valid")
    (colours.train_dir / "blue").rename(colours.train_dir / "azure")
    with pytest.raises(UserError, match=r"`train-dir` .* has `azure`"):
        colours.build(tmp_path).open_split("train")


@pytest.mark.parametrize("leave_folder", [True, False])
def test_a_class_may_have_no_validation_image_and_labels_go_by_name(
    colours: ImageClassificationOptions, leave_folder: bool
) -> None:
    for path in (colours.val_dir / "green").iterdir():
        path.unlink()
    if not leave_folder:
        (colours.val_dir / "green").rmdir()
    task = colours.build(None)
    train, valid = task.open_split("train"), task.open_split("valid")
    assert [valid.label(index) for index in range(len(valid))] == [0, 2, 2]  # blue, red, red
    assert [valid[index][1] for index in range(len(valid))] == [0, 2, 2]
    assert task.look_over(train, valid, CPU) == train.notes() == []
    (line,) = valid.notes()
    assert line == f"warning: classes without an image in `{colours.val_dir}`: 1 of 3, `green`"
    # And so may all classes but one.
    for path in (colours.val_dir / "blue").iterdir():
        path.unlink()
    (colours.val_dir / "blue").rmdir()
    assert [label for _, label in map(task.open_split("valid").__getitem__, range(2))] == [2, 2]


def test_a_digit_may_be_missing_among_the_validation_images(tmp_path: Path) -> None:
    pixels, _ = bars(6)
    train = write_idx(tmp_path / "data", "train", pixels, np.array([0, 1, 2, 0, 1, 2]))
    write_idx(train, "t10k", pixels, np.array([1, 0, 1, 0, 1, 1]))
    task = ImageClassificationOptions(train_dir=train, val_dir=train, model=SMALL).build(None)
    valid = task.open_split("valid")
    assert [valid.label(index) for index in range(6)] == [1, 0, 1, 0, 1, 1]
    (line,) = valid.notes()
    assert line == f"warning: classes without an image in `{train}` (valid): 1 of 3, `2`"


def test_grey_and_coloured_images_are_not_mixed(tmp_path: Path) -> None:
    train = write_idx(tmp_path / "idx", "train", *bars(6))
    valid = tmp_path / "val"
    for name in ("0", "1"):
        write_folders(valid, {"red": 1})
        (valid / "red").rename(valid / name)
    task = ImageClassificationOptions(train_dir=train, val_dir=valid, model=SMALL).build(None)
    with pytest.raises(UserError, match=r"must have images of 1 channels, but those in .* have 3"):
        task.open_split("valid")


def test_what_is_left_open_depends_on_the_kind_of_images(
    colours: ImageClassificationOptions, tmp_path: Path
) -> None:
    folders = ImageClassificationOptions(train_dir=colours.train_dir, val_dir=colours.val_dir).build(None)
    assert (folders.format.image_size, folders.format.crop_pct) == (224, 0.875)
    assert folders.open_split("train").augmentation == AugmentationOptions(crop="resized", hflip=0.5)
    digits = write_idx(tmp_path / "idx", "train", *bars(6))
    task = ImageClassificationOptions(train_dir=digits, val_dir=digits).build(None)
    assert (task.format.image_size, task.format.crop_pct, task.format.num_channels) == (12, 1.0, 1)
    assert task.open_split("train").augmentation == AugmentationOptions(crop="shift", hflip=0.0)
    with pytest.raises(UserError, match="`shift` must come with `crop` shift"):
        replace(colours, augmentation=AugmentationOptions(shift=2)).build(None)


@pytest.mark.parametrize("image_size", [1, 4096, 4097, 16_384])
@pytest.mark.parametrize("crop_pct", [1e-4, 1e-3, 1.0])
def test_a_format_that_may_be_chosen_can_be_read_from_the_model_folder(
    image_size: int, crop_pct: float, tmp_path: Path
) -> None:
    options = ImageClassificationOptions(
        train_dir=Path(), val_dir=Path(), image_size=image_size, crop_pct=crop_pct
    )
    values = {"num_channels": 3, "image_size": image_size, "crop_pct": crop_pct}
    values |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    (tmp_path / "images.json").write_text(json.dumps(values))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    if image_size <= 4096 and crop_pct >= 1e-3:
        options.check()
        assert options.build(tmp_path).format.image_size == image_size
        return
    for refuse in (options.check, lambda: options.build(tmp_path)):
        with pytest.raises(UserError, match=r"(image.size|crop.pct)` must be"):
            refuse()
    # The size may also be that of the images.
    with pytest.raises(UserError, match=r"`(image-size|crop-pct)` must be from"):
        ImageFormat(3, image_size, crop_pct, mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"label_smoothing": 1.0}, "`label-smoothing` must be"),
        ({"image_size": 0}, "`image-size` must be"),
        ({"crop_pct": 1.5}, "`crop-pct` must be"),
        ({"mean": (0.5,)}, "`mean` and `std` must be given together"),
        ({"mean": (0.5,), "std": (0.0,)}, "`std` must be from 1e-06"),
        ({"model_args": ("drop_rate",)}, "must be of the form NAME=VALUE"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        ImageClassificationOptions(train_dir=Path(), val_dir=Path(), **changes).check()


@pytest.mark.parametrize(
    "changes",
    [
        {"rand_augment": 1, "trivial_augment": True},
        {"hflip": 1.5},
        {"mixup": -1.0},
        {"rand_augment": 31},
        {"shift": 0},
        {"shift": 1, "crop": "none"},
    ],
)
def test_augmentation_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"`{next(iter(changes)).replace('_', '-')}` must "):
        AugmentationOptions(**changes).check()


class ByBrightness(nn.Module):
    """Takes an image for class 2 where red is above the mean colour, else for class 0."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        is_red = (images[:, 0].mean(dim=(1, 2)) > 0.5).float()
        return torch.stack([1 - is_red, torch.zeros_like(is_red), is_red], dim=1)


def test_the_pictures_show_a_sample_and_count_every_image(
    colours: ImageClassificationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def keep_counts(counts: np.ndarray, classes: list[str]) -> np.ndarray:
        drawn["counts"] = counts
        return draw_confusion(counts, classes)

    monkeypatch.setattr("nmt.vision.task.draw_confusion", keep_counts)
    task = colours.build(None)
    shown = task.illustrate(ByBrightness(), task.open_split("valid"), CPU)
    # One blue and two green images are taken for blue, two red ones for red.
    assert drawn["counts"].tolist() == [[1, 0, 0], [2, 0, 0], [0, 0, 2]]
    assert set(shown.images) == {"predictions", "confusion"} and not shown.texts
    for picture in shown.images.values():
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    # The blue of the first image is in the picture of the sample.
    assert (np.abs(shown.images["predictions"][30, 30].astype(int) - (40, 60, 200)) <= 60).all()


def test_a_wrong_label_is_red_and_a_right_one_green() -> None:
    images = np.zeros((1, 1, 9, 9), dtype=np.uint8)
    right, wrong = (
        draw_predictions(images, np.array([0]), np.array([guess]), ["a", "b"]).astype(int) for guess in (0, 1)
    )
    assert ((right[..., 1] - right[..., 0]) > 80).any() and not ((right[..., 0] - right[..., 1]) > 80).any()
    assert ((wrong[..., 0] - wrong[..., 1]) > 80).any() and not ((wrong[..., 1] - wrong[..., 0]) > 80).any()


def test_of_many_classes_the_most_confused_are_drawn() -> None:
    counts = np.diag(np.full(500, 1_234_567))
    counts[7, 400], counts[3, 2] = 9, 5
    assert most_confused(counts, 4) == [2, 3, 7, 400]
    many = draw_confusion(counts, [f"a class with a rather long name {i}" for i in range(500)])
    few = draw_confusion(counts[:MOST_CLASSES, :MOST_CLASSES], [str(i) for i in range(MOST_CLASSES)])
    assert few.shape[0] < many.shape[0] < 2 * few.shape[0]


# Stands for a torchvision whose compiled operators do not load: its import describes them to torch.
FAKE = """
import torch
{before}
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold): ...
@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold): ...
__version__ = "9.9"
"""


def import_fake(folder: Path, code: str, *, before: str = "") -> str:
    """Run code in a process whose torchvision is the fake; return what it prints."""
    package = folder / "torchvision"
    (package / "transforms" / "v2").mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE.format(before=before))
    for name in ("transforms", "transforms/v2"):
        (package / name / "__init__.py").write_text("")
    head = f"import sys; sys.path.insert(0, {str(folder)!r})\nimport warnings, torch\n"
    head += "from nmt.vision.libraries import import_torchvision\n"
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


NO_CUDA = "torch.backends.cuda.is_built = lambda: False\n"


def test_a_torchvision_without_its_operators_is_imported_without_a_word(tmp_path: Path) -> None:
    code = NO_CUDA + (
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    print(import_torchvision().transforms.v2.__name__, import_torchvision().__version__)\n"
        "print(*(w.message for w in caught))\n"
    )
    before = "import warnings\nwarnings.warn('Failed to load image Python extension')"
    name, warning = import_fake(tmp_path, code, before=before).split("\n")[:2]
    assert name == "torchvision.transforms.v2 9.9" and warning == ""


def test_with_cuda_or_after_another_failure_nothing_is_declared(tmp_path: Path) -> None:
    code = (
        "try:\n    import_torchvision()\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
        "print(hasattr(torch.ops.torchvision, 'nms'))\n"
    )
    with_cuda = import_fake(
        tmp_path / "a", "torch.backends.cuda.is_built = lambda: True\n" + code
    ).splitlines()
    assert with_cuda[0].startswith("UserError torchvision must be the one made for torch")
    assert with_cuda[1] == "False"
    other = import_fake(tmp_path / "b", NO_CUDA + code, before="raise RuntimeError('something else')")
    assert other.splitlines() == ["RuntimeError something else", "False"]


@pytest.mark.parametrize("missing", ["torchvision", "timm"])
def test_without_the_extra_a_line_says_what_to_install(
    colours: ImageClassificationOptions, tmp_path: Path, missing: str
) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from nmt.cli.train import main\n"
        f"main(['--task', 'image_classification', '--train-dir', {str(colours.train_dir)!r}, '--val-dir', "
        f"{str(colours.val_dir)!r}, '--save-dir', {str(tmp_path / 'run')!r}, '--device', 'cpu'])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "nmt-train: error: Image classification must have torchvision and timm, but there is no module "
        f'`{missing}`. Install them with `pip install "nmt-toolkit[vision]"`.\n'
    )


def test_the_help_of_the_task_imports_no_torch() -> None:
    code = (
        "import sys\nfrom nmt.cli.train import main\n"
        "try:\n    main(['--task', 'image_classification', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'torchvision', 'timm', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--train-dir" in done.stdout and "--mixup" in done.stdout
