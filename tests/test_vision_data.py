"""Images: what is read, what is refused and how, and what a model gets to see."""

import gzip
import pickle
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.image_files import bars, idx_bytes, write_folders, write_idx

from nmt.errors import UserError
from nmt.vision.dataset import ImageExamples
from nmt.vision.options import AugmentationOptions
from nmt.vision.preprocessing import ImageFormat
from nmt.vision.sources import FolderImages, StoredImages, open_images, read_idx

RGB = ImageFormat(num_channels=3, image_size=8, crop_pct=1.0, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
GREY = ImageFormat(num_channels=1, image_size=12, crop_pct=1.0, mean=(0.0,), std=(1.0,))
NONE = AugmentationOptions(crop="none", hflip=0.0)


def refusal(path: Path, split: Any = "train") -> str:
    with pytest.raises(UserError) as caught:
        open_images(path, split)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_folder_pickles_as_its_path_and_notices_when_it_has_changed(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "train", {"red": 300, "blue": 1}, side=2)
    examples = ImageExamples(FolderImages(root), RGB, NONE)
    pickled = pickle.dumps(examples)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert len(again) == 301 and torch.equal(again[7][0], examples[7][0]) and again[7][1] == examples[7][1]
    (root / "red" / "007.png").rename(root / "red" / "seven.png")
    changed = pickle.loads(pickled)  # an error here would end a process that reads, with a traceback
    with pytest.raises(UserError, match=r"must stay the same while they are in use, but have changed"):
        changed[7]


@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gzipped"])
def test_mnist_is_recognised_and_each_split_takes_its_part(tmp_path: Path, below: str, gz: bool) -> None:
    for part, count in (("train", 6), ("t10k", 4)):
        write_idx(tmp_path / below, part, *bars(count, seed=count), gz=gz)
    for split, count in (("train", 6), ("valid", 4)):
        images = open_images(tmp_path, split)  # type: ignore[arg-type]
        pixels, labels = bars(count, seed=count)
        assert len(images) == count and images.classes == ["0", "1"] and images.num_channels == 1
        for index in range(count):
            assert np.array_equal(images.image(index), pixels[index][None])
            assert images.label(index) == labels[index]


def test_idx_images_pickle_as_their_path_and_know_their_statistics(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (50, 9, 9)).astype(np.uint8)
    images = open_images(write_idx(tmp_path, "train", pixels, np.arange(50) % 3), "train")
    assert len(pickle.dumps(images)) < 500
    assert np.array_equal(pickle.loads(pickle.dumps(images)).images[:, 0], pixels)
    assert isinstance(images, StoredImages)
    assert images.mean()[0] == pytest.approx((pixels / 255).mean(), abs=1e-4)
    assert images.std()[0] == pytest.approx((pixels / 255).std(), abs=1e-4)


def test_a_missing_part_and_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pixels, labels = bars(4)
    write_idx(tmp_path, "train", pixels, labels)
    assert f"`{tmp_path / 't10k-images-idx3-ubyte'}` or" in refusal(tmp_path, "valid")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels[:3]))
    assert "must have a label for each image, but has 3 for 4 images" in refusal(tmp_path)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), gz=st.booleans())
def test_a_damaged_idx_file_is_refused(data: st.DataObject, gz: bool, tmp_path_factory: Any) -> None:
    whole = idx_bytes(bars(3)[0])
    content = gzip.compress(whole, mtime=0) if gz else whole
    path = tmp_path_factory.mktemp("idx") / ("train-images-idx3-ubyte" + (".gz" if gz else ""))
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UserError) as caught:
        read_idx(path, num_dims=3)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("num_images", [1, 400_000, 2**32 - 1])
def test_a_small_file_that_inflates_to_much_is_refused_without_being_inflated(
    num_images: int, tmp_path: Path
) -> None:
    """Whether its header says little, what comes, or more than comes."""
    head = idx_bytes(np.zeros((0, 28, 28)))[:4] + struct.pack(">3I", num_images, 28, 28)
    zeros = gzip.compress(bytes(400_000 * 28 * 28 // 10))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(head) + 10 * zeros)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"but has more|than a file of its size can"):
        read_idx(path, num_dims=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 2**20


def grid(side: int) -> torch.Tensor:
    """Return (1, side, side) uint8 with a value of its own at each place."""
    return torch.arange(1, side * side + 1, dtype=torch.uint8).view(1, side, side)


class Given:
    """Images from memory."""

    def __init__(self, images: list[Any], labels: list[int], classes: list[str]) -> None:
        self.images, self.labels, self.classes = images, labels, classes
        self.path, self.num_channels = Path("given"), 1

    def __len__(self) -> int:
        return len(self.images)

    def label(self, index: int) -> int:
        return self.labels[index]

    def image(self, index: int) -> Any:
        return self.images[index]


def test_validation_resizes_the_shorter_side_and_cuts_at_the_centre() -> None:
    """Black, white and black columns, 4 + 8 + 4, of height 8: the cut of 4 at the centre of an 8-pixel resize."""
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, 4:12] = 255
    image = Image.fromarray(pixels)
    format_ = replace(RGB, image_size=4, crop_pct=0.5)
    seen, label = ImageExamples(Given([image], [1], ["a", "b"]), format_)[0]
    assert label == 1 and seen.shape == (3, 4, 4) and seen.dtype == torch.uint8
    assert seen.unique().tolist() == [255]
    wide, _ = ImageExamples(Given([image], [1], ["a", "b"]), replace(RGB, image_size=8))[0]
    assert wide.shape == (3, 8, 8) and wide[0, 0].tolist() == [255] * 8


@pytest.mark.parametrize("is_tensor", [False, True])
def test_a_long_strip_is_cut_before_it_is_enlarged(is_tensor: bool) -> None:
    """Its middle is all that is seen of it; enlarged as a whole it would take gigabytes."""
    strip = torch.zeros(1, 2, 60_000, dtype=torch.uint8)
    strip[:, :, 29_990:30_010] = 200
    image = strip if is_tensor else Image.fromarray(strip[0].numpy()).convert("RGB")
    format_ = replace(GREY if is_tensor else RGB, image_size=224)
    for options in (None, AugmentationOptions(crop="none", hflip=0.0)):
        for one in (
            image,
            image.transpose(1, 2) if is_tensor else image.transpose(Image.Transpose.ROTATE_90),
        ):
            seen, _ = ImageExamples(Given([one], [0], ["a", "b"]), format_, options)[0]
            assert seen.shape[1:] == (224, 224) and seen.unique().tolist() == [200]


def test_normalised_images_are_the_pixels_minus_the_mean_by_the_deviation() -> None:
    examples = ImageExamples(Given([], [], ["a", "b"]), RGB)
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8)
    batch = examples.collate([(pixels, 1), (pixels, 0)])
    # (0 - 0.5) / 0.5, (0.2 - 0.25) / 0.25, (1 - 0) / 1
    expected = torch.tensor([-1.0, -0.2, 1.0]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    torch.testing.assert_close(batch.images, expected)
    assert batch.labels.tolist() == [1, 0] and batch.num_examples == batch.num_targets == 2


def test_a_shift_moves_the_image_within_its_bounds_and_fills_with_black() -> None:
    image = grid(5)
    options = AugmentationOptions(crop="shift", shift=1, hflip=0.0)
    examples = ImageExamples(Given([image], [0], ["a", "b"]), replace(GREY, image_size=5), options)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    possible = {tuple(padded[0, y : y + 5, x : x + 5].flatten().tolist()) for y in range(3) for x in range(3)}
    torch.manual_seed(0)
    seen = {tuple(examples[0][0].flatten().tolist()) for _ in range(200)}
    assert seen == possible


def test_mirroring_and_resized_crops_keep_to_the_image() -> None:
    image = grid(6)
    flipped = ImageExamples(
        Given([image], [0], ["a", "b"]),
        replace(GREY, image_size=6),
        AugmentationOptions(crop="none", hflip=1.0),
    )
    assert torch.equal(flipped[0][0], image.flip(2))
    cropped = ImageExamples(
        Given([image], [0], ["a", "b"]), replace(GREY, image_size=6), AugmentationOptions(crop="resized")
    )
    torch.manual_seed(0)
    seen = torch.stack([cropped[0][0] for _ in range(20)])
    assert seen.shape == (20, 1, 6, 6) and seen.min() >= 1 and seen.max() <= 36
    assert len(seen.unique(dim=0)) > 10


def test_erasing_paints_a_rectangle_in_the_mean_colour() -> None:
    white = Image.new("RGB", (8, 8), (255, 255, 255))
    options = AugmentationOptions(crop="none", hflip=0.0, random_erasing=1.0)
    torch.manual_seed(0)
    seen, _ = ImageExamples(Given([white], [0], ["a", "b"]), RGB, options)[0]
    erased = seen[2] == 0  # the mean of blue is 0, of red half of 255
    assert 0 < erased.sum() < 64
    assert seen[0][erased].unique().tolist() == [128] and seen[0][~erased].unique().tolist() == [255]


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_blended_images_are_labelled_with_their_shares(name: str) -> None:
    """Of uniform images 0, 100 and 200 each pixel, or the mean pixel, tells the shares."""
    images = [torch.full((1, 12, 12), value, dtype=torch.uint8) for value in (0, 100, 200)]
    options = AugmentationOptions(crop="none", hflip=0.0, **{name: 1.0})
    examples = ImageExamples(Given(images, [0, 1, 2], ["a", "b", "c"]), GREY, options)
    torch.manual_seed(0)
    for _ in range(5):
        batch = examples.collate([examples[index] for index in range(3)])
        assert batch.labels.shape == (3, 3)
        torch.testing.assert_close(batch.labels.sum(dim=1), torch.ones(3))
        values = batch.labels @ torch.tensor([0.0, 100.0, 200.0]) / 255
        torch.testing.assert_close(batch.images.mean(dim=(1, 2, 3)), values)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_all_augmentation_together_makes_images_of_the_right_shape(num_channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    image = Image.fromarray(pixels) if num_channels == 3 else torch.from_numpy(pixels[None, :, :, 0].copy())
    options = AugmentationOptions(
        crop="resized", hflip=0.5, rand_augment=9, random_erasing=0.5, mixup=0.2, cutmix=1.0
    )
    format_ = RGB if num_channels == 3 else replace(GREY, image_size=8)
    examples = ImageExamples(Given([image] * 4, [0, 1, 0, 1], ["a", "b"]), format_, options)
    for seed in range(20):
        torch.manual_seed(seed)
        batch = examples.collate([examples[index] for index in range(4)])
        assert batch.images.shape == (4, num_channels, 8, 8) and batch.images.isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [{"trivial_augment": True}, *({"auto_augment": name} for name in ("imagenet", "cifar10", "svhn"))],
)
def test_found_policies_change_images_and_keep_their_shape(changes: dict[str, Any]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    plain = Image.fromarray(pixels)
    options = replace(NONE, **changes)
    options.check()
    examples = ImageExamples(Given([plain], [0], ["a", "b"]), RGB, options)
    seen = []
    for seed in range(20):
        torch.manual_seed(seed)
        seen.append(examples[0][0])
        assert seen[-1].shape == (3, 8, 8) and seen[-1].dtype == torch.uint8
        torch.manual_seed(seed)
        assert torch.equal(examples[0][0], seen[-1])  # all of its choices are torch's
    assert len(torch.stack(seen).unique(dim=0)) > 5
    grey = ImageExamples(Given([grid(12)], [0], ["a", "b"]), GREY, options)
    assert all(grey[0][0].shape == (1, 12, 12) for _ in range(10))


def test_a_mean_for_another_number_of_channels_is_refused() -> None:
    with pytest.raises(UserError, match=r"`mean` must have a value for each channel, of which there are 1"):
        replace(GREY, mean=(0.5, 0.5, 0.5))
