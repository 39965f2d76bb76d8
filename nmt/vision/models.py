"""Make a model of timm or torchvision from its name, or the user's own model from its import path."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from nmt.errors import UserError, shown
from nmt.vision.libraries import import_timm, import_torchvision
from nmt.vision.own_models import import_model_class, is_import_path, suitable_arguments

LIBRARIES = ("timm", "torchvision")


def build_model(
    name: str,
    arguments: Sequence[str] = (),
    *,
    num_classes: int,
    num_channels: int,
    image_size: int,
    is_pretrained: bool = False,
) -> nn.Module:
    """Make a model that takes (B, num_channels, image_size, image_size) and returns (B, num_classes) scores.

    Args:
        name: timm/NAME or torchvision/NAME; a bare NAME is looked for in both, in this order. Or
            package.module:Class, which gets those of the numbers below that it has parameters for.
        arguments: Further arguments of the model, each as NAME=VALUE, the value in YAML.
        num_classes: Number of scores for an image.
        num_channels: Number of channels of an image.
        image_size: Height and width of an image.
        is_pretrained: Take over timm's weights.

    Raises:
        UserError: The name is unknown, or the model does not take the arguments or the images.
    """
    if is_pretrained and (is_import_path(name) or find_model(name)[0] != "timm"):
        raise UserError(
            f"`pretrained` must come with a model of timm, but `model` is {shown(name)}. Leave it out."
        )
    if is_import_path(name):
        cls = import_model_class(name)
        sizes = {"num_classes": num_classes, "num_channels": num_channels, "image_size": image_size}
        model = _call(name, cls, **{**suitable_arguments(cls, **sizes), **_parse(arguments)})
        _try_out(model, name, torch.zeros(1, num_channels, image_size, image_size), num_classes=num_classes)
        return model
    library, bare_name = find_model(name)
    options = {"num_classes": num_classes, **_parse(arguments)}
    if library == "torchvision":
        model = _call(name, import_torchvision().models.get_model, bare_name, **options)
        _set_num_channels(model, num_channels)
    else:
        create = import_timm().create_model
        options = {"in_chans": num_channels, **options}
        # First without weights, to tell wrong arguments from a failed download.
        model = _call(name, create, bare_name, **options)
        if is_pretrained:
            model = _download(name, create, bare_name, options)
    _try_out(model, name, torch.zeros(1, num_channels, image_size, image_size), num_classes=num_classes)
    return model


def find_model(name: str) -> tuple[str, str]:
    """Return the library that has a model, and the model's name there.

    Raises:
        UserError: No library has it.
    """
    prefix, slash, bare_name = name.partition("/")
    libraries = [prefix] if slash else list(LIBRARIES)
    bare_name = bare_name if slash else name
    if not set(libraries) <= set(LIBRARIES):
        raise UserError(f"`model` must be timm/NAME or torchvision/NAME, but is {shown(name)}.")
    near: list[str] = []
    for library in libraries:
        known = _list_models(library)
        # timm's names may end with a tag for the weights: resnet18.a1_in1k.
        stem = bare_name.partition(".")[0] if library == "timm" else bare_name
        if stem in known:
            return library, bare_name
        near += [f"{library}/{match}" for match in difflib.get_close_matches(stem, known, n=3)]
    hint = f" Perhaps you meant one of {', '.join(near)}?" if near else ""
    raise UserError(f"`model` must be a model of {' or '.join(libraries)}, but is {shown(name)}.{hint}")


def _list_models(library: str) -> list[str]:
    if library == "timm":
        return list(import_timm().list_models())
    torchvision = import_torchvision()
    return list(torchvision.models.list_models(module=torchvision.models))  # without detection, segmentation


def _parse(arguments: Sequence[str]) -> dict[str, Any]:
    parsed = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        try:
            parsed[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"`model-args` must have values in YAML, but one is {shown(argument)}."
            ) from error
    return parsed


def _call(name: str, create: Any, *args: Any, **options: Any) -> nn.Module:
    """Make a model; its error about the user's arguments is shown in one line."""
    try:
        model = create(*args, **options)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AssertionError,
        AttributeError,
        KeyError,
        IndexError,
        OSError,  # a file that an argument names, such as timm's checkpoint_path
    ) as error:
        raise UserError(
            f"`model-args` must be arguments that `{name}` takes, but it says: {_first_line(error)}."
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _download(name: str, create: Any, bare_name: str, options: dict[str, Any]) -> nn.Module:
    try:
        model = create(bare_name, pretrained=True, **options)
    except Exception as error:  # each host of weights, and each way to it, has its own errors
        raise UserError(
            f"The weights of `{name}` must be in timm's cache or within reach, but: {_first_line(error)}. "
            "Leave out `pretrained`, or run once where there is a network."
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _set_num_channels(model: nn.Module, num_channels: int) -> None:
    """Give a model that was made for 3 channels a first convolution for another number of them."""
    convolutions = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    name, module = next(convolutions, ("", None))
    if module is None or module.in_channels == num_channels:
        return  # if the model does not fit, `_try_out` says so
    assert isinstance(module.padding, tuple)
    first = nn.Conv2d(
        num_channels,
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]
        stride=module.stride,  # type: ignore[arg-type]
        padding=module.padding,  # type: ignore[arg-type]
        bias=module.bias is not None,
    )
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, first)


@torch.no_grad()
def _try_out(model: nn.Module, name: str, image: Tensor, *, num_classes: int) -> None:
    """Raise `UserError` unless the model computes scores from an image."""
    was_training = model.training
    shape = "x".join(map(str, image.shape[1:]))
    try:
        scores = model.eval()(image)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise UserError(
            f"`model` must take images of {shape}, but `{name}` says: {_first_line(error)}. "
            "Change `image-size`, or the model by `model-args`."
        ) from error
    if not isinstance(scores, Tensor) or scores.shape != (1, num_classes):
        found = f"the shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(
            f"`model` must return {num_classes} scores for an image, but `{name}` returns {found}."
        )
    model.train(was_training)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
