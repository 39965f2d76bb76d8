"""Folders of class folders: what is listed, what is left out and counted, what is refused."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.image_files import write_folders

from nmt.errors import UserError
from nmt.vision.sources import FolderImages, open_images


def refusal(path: Path, split: Any = "train") -> str:
    with pytest.raises(UserError) as caught:
        open_images(path, split)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_folder_of_class_folders_is_listed_in_the_order_of_the_names(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "train", {"red": 2, "blue": 1})
    (root / "red" / "deeper").mkdir()
    Image.new("L", (5, 5)).save(root / "red" / "deeper" / "grey.JPG")
    (root / "red" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    (root / "README.md").write_text("no class")
    images = open_images(root, "train")
    assert images.classes == ["blue", "red"]
    assert isinstance(images, FolderImages)
    assert images.files == ["blue/000.png", "red/000.png", "red/001.png", "red/deeper/grey.JPG"]
    assert [images.label(index) for index in range(len(images))] == [0, 1, 1, 1]
    assert [images.image(index).mode for index in range(len(images))] == ["RGB"] * 4


def test_what_is_no_folder_of_images_is_refused_by_name(tmp_path: Path) -> None:
    assert f"`{tmp_path / 'lost'}` must be a folder that can be read" in refusal(tmp_path / "lost")
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert f"`{tmp_path / 'empty'}` must hold a folder of images for each" in refusal(tmp_path / "empty")
    one = write_folders(tmp_path / "one", {"red": 1})
    assert "has: red" in refusal(one)
    (one / "void").mkdir()
    assert f"`{one / 'void'}` must hold images of its class" in refusal(one)
    for path in (one / "red").iterdir():
        path.unlink()
    for split in ("train", "valid"):
        assert f"`{one}` must hold images" in refusal(one, split)
    write_folders(tmp_path / "two", {"red": 1})
    (tmp_path / "two" / "red").rename(one / "pink")
    (one / "void").rmdir()
    (one / "two\nlines").mkdir()
    Image.new("L", (5, 5)).save(one / "two\nlines" / "a.png")
    assert r"must be printable, but 'two\nlines'" in refusal(one)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folders(tmp_path / "train", {"red": 1, "blue": 1})
    scandir = os.scandir

    def locked(path: Any) -> Any:
        if Path(path).name == "red":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert f"`{root / 'red'}` must be a folder that can be read, but: Permission denied" in refusal(root)


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (3, 3)).save(path)
    return path


def test_what_systems_and_tools_leave_behind_is_no_class_and_no_image(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "train", {"red": 1, "blue": 1})
    for litter in ("__MACOSX", "@eaDir", "lost+found", ".cache"):
        image(root / litter / "a.png")
        image(root / "red" / litter / "a.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._000.png"):
        (root / "red" / name).write_text("x")
    images = FolderImages(root)
    assert images.files == ["blue/000.png", "red/000.png"]
    assert not images.left_out.suffixes and not images.left_out.num_beside


def test_files_of_other_kinds_and_images_beside_the_folders_are_counted(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "train", {"red": 1, "blue": 1})
    for name in ("red/a.heic", "red/deeper/b.HEIC", "blue/c.txt", "blue/noending"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    image(root / "beside.png")
    os.mkfifo(root / "red" / "pipe.png")  # to open it would wait for ever
    (root / "README.md").write_text("no image, and not where one should be")
    left_out = FolderImages(root).left_out
    assert left_out.suffixes == {".heic": 2, ".txt": 1, "": 1, ".png": 1}
    assert left_out.num_beside == 1


def test_each_image_is_read_once_whatever_links_lead_back(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "train", {"red": 2, "blue": 1})
    (root / "red" / "loop").symlink_to(".")
    (root / "red" / "up").symlink_to("../..")
    (root / "blue" / "to_red").symlink_to(root / "red")  # red in blue: as it is said
    (root / "red" / "deep").mkdir()
    (root / "red" / "deep" / "back").symlink_to(root / "red")
    (root / "itself").symlink_to(root)
    (root / "red" / "nowhere").symlink_to("nowhere")
    images = FolderImages(root)
    assert images.classes == ["blue", "red"]
    assert images.files == [
        "blue/000.png",
        "blue/to_red/000.png",
        "blue/to_red/001.png",
        "red/000.png",
        "red/001.png",
    ]
    loops = {str(Path(path).relative_to(root)) for path in images.left_out.loops}
    assert loops >= {"red/loop", "red/up", "red/deep/back", "itself", "blue/to_red/loop"}


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "train", {"red": 1, "blue": 1})
    (root / "red" / "other").symlink_to(root / "blue")
    (root / "blue" / "other").symlink_to(root / "red")
    assert FolderImages(root).files == [
        "blue/000.png",
        "blue/other/000.png",
        "red/000.png",
        "red/other/000.png",
    ]


def test_links_to_images_and_to_class_folders_are_followed(tmp_path: Path) -> None:
    elsewhere = write_folders(tmp_path / "elsewhere", {"red": 2})
    root = write_folders(tmp_path / "train", {"blue": 1})
    (root / "red").symlink_to(elsewhere / "red")
    (root / "blue" / "linked.png").symlink_to(elsewhere / "red" / "000.png")
    (root / "blue" / "lost.png").symlink_to("gone.png")
    images = FolderImages(root)
    assert images.files == ["blue/000.png", "blue/linked.png", "blue/lost.png", "red/000.png", "red/001.png"]
    assert images.image(1).size == (28, 24)
    with pytest.raises(UserError, match=r"lost\.png` must be an image, but .*No such file"):
        images.image(2)  # told, and not left out


def test_a_class_without_images_is_told_and_none_where_not_all_are_needed(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "val", {"red": 2, "blue": 1})
    (root / "green").mkdir()
    images = open_images(root, "valid")
    assert isinstance(images, FolderImages)
    assert images.classes == ["blue", "red"]
    text = refusal(root, "train")
    assert "Fill it, or let the model do without the class: remove the folder here and where" in text
