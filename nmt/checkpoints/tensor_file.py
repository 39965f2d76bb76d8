"""Tensors in a file of this release's format: safetensors, whose metadata name the format and its version."""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nmt.errors import DamagedError, UserError

FORMAT_VERSION = "2"
_READABLE_VERSIONS = ("1", FORMAT_VERSION)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors, from any device, into a file.

    Raises:
        OSError: It could not be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": f"nmt {FORMAT_VERSION}"})
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it private, against the umask
    except SafetensorError as error:  # the number of the system's error is only in its text
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(path)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Raises:
        UserError: It is missing, damaged, or of another format version.
    """
    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, error) from error


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the type and the shape of each tensor in a file, without reading them.

    Raises:
        UserError: It is missing, not whole, or of a format version that cannot be read.
    """
    existing(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is not a mapping
            header = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, error) from error
    _check_version(metadata, path)
    return header


def existing(path: Path) -> Path:
    """Return a path, which must be a file.

    Raises:
        DamagedError: There is no file.
    """
    if not path.is_file():
        raise DamagedError(f"`{path}` must be a file of the checkpoint, but is missing.")
    return path


def _damaged(path: Path, error: Exception) -> DamagedError:
    return DamagedError(
        f"`{path}` must be a complete safetensors file, but is cut short or damaged: {error}."
    )


def _check_version(metadata: Mapping[str, str], path: Path) -> None:
    """Raise `UserError` if this release cannot read a file's format version, and say what to do."""
    name, _, version = metadata.get("format", "").partition(" ")
    # Name and version share one entry, because safetensors writes several in varying order. Old files have two.
    version = version or metadata.get("format_version", "")
    if name != "nmt":
        raise UserError(
            f"`{path}` must be of format version {FORMAT_VERSION}, but is of none: "
            "nmt-toolkit did not write it. Name a model folder of nmt-train or nmt-convert."
        )
    if version in _READABLE_VERSIONS:
        return
    is_newer = version.isdecimal() and int(version) > int(FORMAT_VERSION)
    what_to_do = (
        "A newer release of nmt-toolkit wrote it: install that one."
        if is_newer
        else "An older release of nmt-toolkit wrote it: use that one, "
        "or train again with this one on the same data."
    )
    raise UserError(
        f"`{path}` must be of format version {FORMAT_VERSION}, but is of {version or 'none'}. {what_to_do}"
    )
