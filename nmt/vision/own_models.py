"""A model of the user's own, by its import path: package.module:Class."""

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from torch import nn

from nmt.errors import UserError

_PARAMETERS = {
    "num_classes": ("num_classes", "n_classes"),
    "num_channels": ("num_channels", "in_channels", "in_chans"),
    "image_size": ("image_size", "img_size"),
}
"""The names that classes may use for their sizes."""


def is_import_path(name: str) -> bool:
    """Return whether a model's name is an import path."""
    return ":" in name


def import_model_class(name: str) -> type[nn.Module]:
    """Return the class that package.module:Class names; the module may be in the current folder.

    Only subclasses of `nn.Module` are accepted, so that a model folder cannot name an arbitrary function.

    Raises:
        UserError: There is no such class.
    """
    module_name, _, class_name = name.partition(":")
    folder = str(Path.cwd())  # installed commands do not look there
    sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
        for part in class_name.split("."):
            found = getattr(found, part)
    except Exception as error:  # the code of the module may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"`model` must be a class that can be imported, such as package.module:Class, but `{name}` cannot: "
            f"{reason}. Name another, or install its package."
        ) from error
    finally:
        sys.path.remove(folder)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"`model` must be a class of torch.nn.Module, but `{name}` is none. Name one.")
    return found


def suitable_arguments(cls: type[nn.Module], **sizes: int) -> dict[str, int]:
    """Return those of `num_classes`, `num_channels` and `image_size` that a class takes, under its own names."""
    taken = inspect.signature(cls).parameters
    return {name: sizes[size] for size, names in _PARAMETERS.items() for name in names if name in taken}
