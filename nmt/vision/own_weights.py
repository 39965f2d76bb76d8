"""The user's own weights to begin with, from files of several kinds."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nmt.checkpoints.find_folder import MODEL_NAME
from nmt.checkpoints.weights import weights
from nmt.errors import UserError
from nmt.interop.safe_unpickle import StoredTensor, read_torch_file

_KEYS = ("state_dict", "model", "model_state_dict", "net", "weights")
"""The names that training scripts give to the weights in their files."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""The prefixes that DDP, torch.compile and Lightning put before each name."""
_NUM_NAMED = 4


@torch.no_grad()
def take_weights(model: nn.Module, path: Path) -> str:
    """Copy the weights that fit into a model, by name and shape, and return a line on those that do not fit.

    Args:
        model: The model. A part without weights in the file, such as a head for other classes, stays as it is.
        path: A safetensors file, a file of `torch.save` (nothing in it is executed), or a model folder.

    Raises:
        UserError: The file cannot be read, or none of its weights fits.
    """
    own = weights(model)
    found = _without_prefixes(_read(path), own)
    fitting = [name for name in own if name in found and found[name].shape == own[name].shape]
    if not any(own[name].is_floating_point() for name in fitting):
        raise UserError(
            f"`weights` must hold weights of the model, but of the tensors in `{path}` ({len(found):,}) "
            f"none fits one of its {len(own):,} by name and shape. There are {_named(found)}; the model has "
            f"{_named(own)}."
        )
    for name in fitting:
        own[name].copy_(found[name])
    sizes = [f"{name} {tuple(found[name].shape)}" for name in own if name in found and name not in fitting]
    missing = [name for name in own if name not in found]
    surplus = [name for name in found if name not in own]
    faults = (("of another shape", sizes), ("not in the file", missing), ("not in the model", surplus))
    told = "".join(f"; {what}: {len(names):,} ({_named(names)})" for what, names in faults if names)
    return f"weights: {len(fitting):,} of {len(own):,} from `{path}`{told}"


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name."""
    if path.is_dir():
        path = path / MODEL_NAME
    if not path.is_file():
        raise UserError(f"`weights` must be a file or a model folder, but `{path}` is missing. Name another.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, RuntimeError) as error:
            raise UserError(
                f"`{path}` must be a complete safetensors file, but is damaged: {error}. Get it anew."
            ) from error
    content = read_torch_file(path)
    found = _tensors(content)
    for key in _KEYS:
        if not found and isinstance(content, Mapping):
            found = _tensors(content.get(key))
    if not found:
        raise UserError(
            f"`{path}` must hold a dictionary of weights by name, alone or as {', '.join(_KEYS)}, but has none. "
            "Save the model's `state_dict()`."
        )
    return {name: tensor.load() for name, tensor in found.items()}


def _tensors(content: Any) -> dict[str, StoredTensor]:
    if not isinstance(content, Mapping):
        return {}
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, StoredTensor)
    }


def _without_prefixes(found: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove prefixes that all names of the file have and no name of the model has."""
    for _ in range(3):
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in found) and not any(
                name.startswith(prefix) for name in own
            ):
                found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _named(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:_NUM_NAMED]) + (", ..." if len(shown) > _NUM_NAMED else "")
