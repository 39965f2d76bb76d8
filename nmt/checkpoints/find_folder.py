"""Which model folder a user means by naming a run, and where the data are if a run was moved."""

import errno
import filecmp
import os
import re
from dataclasses import dataclass
from pathlib import Path

from nmt.errors import UserError
from nmt.system.new_folder import remove_folder

MODEL_NAME = "model.safetensors"
CHECKPOINTS_NAME = "checkpoints"
_LONGEST_NAME = 100
# Errors of a disk on which writing a file would fail like making a symbolic link.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


@dataclass(frozen=True)
class FoundModel:
    """A model folder, and a note on how it was found."""

    folder: Path
    note: str | None  # None if the folder itself was named


def find_model(path: Path) -> FoundModel:
    """Return the model folder at a path, or the best checkpoint if the path is a run or its `checkpoints` folder.

    Raises:
        UserError: There is no model.
    """
    if (follow_link(path) / MODEL_NAME).is_file():
        return FoundModel(follow_link(path), None)
    checkpoints = find_checkpoints(path)
    if checkpoints is None:
        raise UserError(_explain_no_model(path))
    for name, kind in (
        ("best", "the best checkpoint"),
        ("last", "the last checkpoint, as none was validated"),
    ):
        folder = follow_link(checkpoints / name)
        if (folder / MODEL_NAME).is_file():
            update = re.search(r"\d+$", folder.resolve().name)
            counted = f", of update {int(update[0]):,}" if update else ""
            return FoundModel(folder, f"{folder} ({kind}{counted})")
    raise UserError(
        f"`{path}` must hold a checkpoint to take the model from, but has none yet. Wait for the first one, or "
        "name another folder."
    )


def find_models(models: str) -> list[FoundModel]:
    """Return the model folder that is named, or the folders of an ensemble A:B.

    Raises:
        UserError: One of them is not a model.
    """
    try:
        return [find_model(path) for path in split_models(models)]
    except UserError as error:
        aside = " Colons part the models of an ensemble." if ":" in models else ""
        raise UserError(f"{error}{aside}") from error


def follow_link(path: Path) -> Path:
    """Return the folder that `best` or `last` stands for if the file system has no symbolic links.

    There it is a file with the name of a folder beside it (`write_link`). Any other path is returned as it is.
    """
    if path.is_file() and path.stat().st_size < _LONGEST_NAME:
        name = path.read_bytes().decode("utf-8", "replace").strip()
        if re.fullmatch(r"update-\d+", name) and (path.parent / name).is_dir():
            return path.parent / name
    return path


def write_link(path: Path, name: str) -> None:
    """Let `path` stand for the folder `name` beside it, atomically: a symbolic link, or a file with that name.

    Raises:
        UserError: There is a folder at `path` that is not a copy of one beside it.
    """
    temporary = path.with_name(f".{path.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(name)
    except (OSError, NotImplementedError) as error:
        # File systems without symbolic links give different errors, some without a number.
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        temporary.write_text(f"{name}\n", encoding="utf-8")
    if path.is_dir() and not path.is_symlink():
        _remove_copy(path)
    temporary.replace(path)


def _remove_copy(path: Path) -> None:
    """Remove the folder that stands for a link if a program that follows links has copied the run."""
    model = path / MODEL_NAME
    beside = [folder / MODEL_NAME for folder in path.parent.glob("update-*")]
    if not model.is_file() or not any(
        other.is_file() and filecmp.cmp(model, other, shallow=False) for other in beside
    ):
        raise UserError(
            f"`{path}` must be a link that the run sets, but is a folder, and no copy of a checkpoint beside it. "
            "Rename it, and the same command goes on."
        )
    remove_folder(path)


def find_checkpoints(path: Path) -> Path | None:
    """Return the `checkpoints` folder of a run, or `path` if it is that folder; None if it is neither."""
    for folder in (path / CHECKPOINTS_NAME, path):
        if folder.is_dir() and (folder.name == CHECKPOINTS_NAME or any(folder.glob("update-*"))):
            return folder
    return None


def split_models(models: str) -> list[Path]:
    """Return the folders of an ensemble A:B. A colon within the name of an existing folder does not split it."""
    parts = models.split(":")
    for end in range(len(parts), 0, -1):
        first = Path(":".join(parts[:end]))
        if first.exists() and end == len(parts):
            return [first]
        if first.exists():
            others = split_models(":".join(parts[end:]))
            if all(other.exists() for other in others):
                return [first, *others]
    return [Path(part) for part in parts]


def moved_path(path: Path, *, old_run: Path, model_folder: Path) -> Path | None:
    """Return where a path of a run's configuration is now, if the run and that path were moved together.

    Args:
        path: As the configuration has it: absolute, or relative to where the run was started.
        old_run: The folder of the run, in the same form.
        model_folder: Where a checkpoint of the run is now.
    """
    run = model_folder.resolve().parent.parent
    if path.is_absolute() != old_run.is_absolute() or model_folder.resolve().parent.name != CHECKPOINTS_NAME:
        return None
    moved = Path(os.path.normpath(run / os.path.relpath(path, old_run)))
    return moved if moved.exists() else None


def _explain_no_model(path: Path) -> str:
    if not path.exists():
        return f"`{path}` must be a model folder, but is missing. Name one, such as RUN/checkpoints/best."
    if not path.is_dir():
        return f"`{path}` must be a model folder, but is a file. Name a folder, such as RUN/checkpoints/best."
    return (
        f"`{path}` must be a model folder, but has no {MODEL_NAME}. Name the folder of a run, a checkpoint such "
        "as RUN/checkpoints/best, or what nmt-average or nmt-convert wrote."
    )
