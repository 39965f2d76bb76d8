"""Image files: which are read and as what, which are refused and how, and what a quick look at one finds."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from nmt.errors import UserError
from nmt.vision.image_files import (
    UnreadableImage,
    look_at,
    read_image,
    readable_suffixes,
    without_pillows_warnings,
)

EXIF_ORIENTATION = 274
LOSSLESS = [".png", ".gif", ".bmp", ".ppm", ".tif", ".webp"]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    if path.suffix == ".webp":
        options["lossless"] = True
    image.save(path, **options)
    return path


def look(path: Path) -> None:
    with without_pillows_warnings():
        look_at(path)


def _cut_short(path: Path) -> None:
    Image.effect_noise((40, 40), 50).save(path)
    path.write_bytes(path.read_bytes()[:300])


DAMAGES = {
    "cut.png": _cut_short,
    "cut.jpg": _cut_short,
    "empty.png": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("no image at all"),
    "deep.tiff": lambda path: Image.fromarray(np.full((4, 4), 40_000, dtype=np.int32)).save(path),
    "postscript.png": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "float.tiff": lambda path: Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(path),
    "lost.png": lambda path: None,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_foreign_file_is_named(tmp_path: Path, name: str) -> None:
    DAMAGES[name](tmp_path / name)
    for reader in (read_image, look):
        with pytest.raises(UnreadableImage) as caught:
            reader(tmp_path / name)
        assert str(caught.value).startswith(f"`{tmp_path / name}` must ") and "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_are_an_image_or_are_refused(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / f"a.{data.draw(st.sampled_from(['png', 'jpg', 'bmp', 'webp', 'tiff', 'ppm']))}"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    for reader in (read_image, look):
        try:
            image = reader(path)
            assert image is None or image.mode == "RGB"
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_transparency_and_palettes_become_colours(tmp_path: Path) -> None:
    image = Image.new("P", (3, 3))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 1)
    image.save(tmp_path / "palette.png", transparency=bytes([0, 255]))
    read = read_image(tmp_path / "palette.png")
    assert read.getpixel((0, 0)) == (10, 20, 30) and read.getpixel((1, 1)) == (200, 100, 50)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_an_image_is_turned_upright_as_its_camera_has_noted(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    """EXIF: the first row and the first column of what is stored are which sides of the scene."""
    upright = np.zeros((40, 56, 3), dtype=np.uint8)
    upright[:16, :16] = 255  # the upper left corner
    upright[:16, 40:, 0] = 255  # the upper right one is red
    rows, columns = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    stored = upright if rows in ("top", "bottom") else upright.transpose(1, 0, 2)
    stored = stored[::-1] if rows in ("bottom", "right") else stored
    stored = stored[:, ::-1] if columns in ("bottom", "right") else stored
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[EXIF_ORIENTATION] = orientation
    read = np.asarray(read_image(save(tmp_path / f"a{suffix}", image, exif=exif)))
    assert read.shape == upright.shape
    assert np.abs(read.astype(int) - upright).mean() < 5


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0garbage", b"\xff" * 40]
)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_an_image_with_damaged_meta_data_stays_as_it_is(tmp_path: Path, suffix: str, exif: bytes) -> None:
    path = save(tmp_path / f"a{suffix}", Image.fromarray(noise(6, 9, 3)), exif=exif)
    assert read_image(path).size == (9, 6)
    look(path)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_there_is_not_is_passed_over(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(noise(6, 9, 3))
    exif = image.getexif()
    exif[EXIF_ORIENTATION] = orientation
    assert read_image(save(tmp_path / "a.png", image, exif=exif)).size == (9, 6)


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_kinds_that_lose_nothing_give_the_pixels_back(tmp_path: Path, suffix: str) -> None:
    pixels = noise(6, 9, 1).repeat(3, axis=2)  # grey, so that a palette suffices for GIF
    path = save(tmp_path / f"a{suffix}", Image.fromarray(pixels))
    look(path)
    assert np.array_equal(read_image(path), pixels)
    upper = path.rename(path.with_suffix(suffix.upper()))
    assert np.array_equal(read_image(upper), pixels)


def test_the_suffix_may_lie(tmp_path: Path) -> None:
    pixels = noise(6, 9, 3)
    path = save(tmp_path / "a.png", Image.fromarray(pixels)).rename(tmp_path / "a.jpg")
    look(path)
    assert np.array_equal(read_image(path), pixels)


def test_of_sixteen_bits_the_higher_eight_are_kept(tmp_path: Path) -> None:
    deep = np.array([[0, 255, 256, 65535], [32768, 1000, 40_000, 257]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        path = tmp_path / name
        Image.fromarray(deep).save(path)
        look(path)
        read = np.asarray(read_image(path))
        assert np.array_equal(read, (deep // 256)[..., None].repeat(3, axis=2))
    (tmp_path / "a.pgm").write_bytes(b"P5 4 2 65535\n" + deep.astype(">u2").tobytes())
    assert np.array_equal(read_image(tmp_path / "a.pgm"), read)


def test_cmyk_grey_bilevel_and_alpha_become_colours(tmp_path: Path) -> None:
    read = read_image(save(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=95))
    assert np.abs(np.asarray(read).astype(int) - (255, 0, 0)).max() < 6
    assert read_image(save(tmp_path / "grey.png", Image.new("L", (2, 2), 7))).getpixel((0, 0)) == (7, 7, 7)
    assert read_image(save(tmp_path / "one.png", Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255,) * 3
    read = read_image(save(tmp_path / "half.png", Image.new("LA", (2, 2), (90, 10))))
    assert read.getpixel((0, 0)) == (90, 90, 90)


def test_of_an_animation_the_first_picture_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 4), (250, 0, 0)), Image.new("RGB", (4, 4), (0, 250, 0))
    for suffix in (".gif", ".webp", ".tif"):
        path = save(tmp_path / f"a{suffix}", first, save_all=True, append_images=[second])
        look(path)
        assert read_image(path).getpixel((0, 0)) == (250, 0, 0)


def test_an_image_of_too_many_pixels_is_refused_and_a_large_one_is_read_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.png", Image.new("L", (20, 20)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert read_image(path).size == (20, 20)
    look(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    for reader in (read_image, look):
        with pytest.raises(UnreadableImage, match="must have at most 300 pixels, but has more"):
            reader(path)


@pytest.mark.parametrize("suffix", [*LOSSLESS, ".jpg"])
def test_a_quick_look_finds_every_file_that_is_cut_short(tmp_path: Path, suffix: str) -> None:
    """As it is by a full disk, or by a copy that was broken off."""
    whole = save(tmp_path / f"whole{suffix}", Image.fromarray(noise(40, 40, 3)))
    content = whole.read_bytes()
    look(whole)
    cut = tmp_path / f"cut{suffix}"
    for length in np.linspace(0, len(content) - 40, 12).astype(int):
        cut.write_bytes(content[:length])
        with pytest.raises(UnreadableImage):
            look(cut)


def test_a_quick_look_decodes_only_what_is_in_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"a{suffix}" for suffix in (*LOSSLESS, ".jpg")]
    for name in names:
        save(tmp_path / name, Image.fromarray(noise(9, 7, 3)))
    phone = save(tmp_path / "phone.jpg", Image.fromarray(noise(9, 7, 3)))
    phone.write_bytes(phone.read_bytes() + b"what a phone adds")
    decoded: list[Path] = []
    monkeypatch.setattr("nmt.vision.image_files._read", decoded.append)
    for name in (*names, "phone.jpg"):
        look(tmp_path / name)
    assert decoded == [phone]


def test_what_pillow_was_built_without_is_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".ppm"} <= set(readable_suffixes())
    monkeypatch.setattr(features, "check", lambda name: False)
    assert not {".webp", ".avif", ".jp2"} & set(readable_suffixes())


def test_reading_leaves_the_filters_of_warnings_as_they_are(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("L", (2, 2)))
    before = list(warnings.filters)
    read_image(path)
    assert warnings.filters == before
