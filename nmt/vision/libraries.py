"""Import torchvision and timm when they are needed.

They are imported only here, because they may be missing, and because the torchvision that the package index has
for Linux is built for CUDA. With a torch without CUDA its compiled operators cannot be loaded. Its import ends
with "operator torchvision::nms does not exist" (https://github.com/pytorch/vision/issues/9085), because it
describes two operators to torch that were never declared. Transforms, data sets and models do not need these
operators. So this module declares the two, without defining them, and tries the import again. There is no
warning, because nothing that is used here is missing.
"""

import importlib
import warnings
from typing import Any

import torch

from nmt.errors import UserError

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> Any:
    """Return the package torchvision, with `datasets`, `models` and `transforms.v2`.

    Raises:
        UserError: It is not installed, or it does not fit the installed torch.
    """
    try:
        torchvision = _import("torchvision")
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
        if torch.backends.cuda.is_built():
            raise UserError(
                f"torchvision must be the one made for torch {torch.__version__}, but its operators cannot be "
                "loaded. Install both from one source: see https://pytorch.org/get-started/locally."
            ) from error
        torchvision = _import_without_operators()
    _import("torchvision.transforms.v2")
    return torchvision


def import_timm() -> Any:
    """Return the package timm.

    Raises:
        UserError: It is not installed.
    """
    import_torchvision()  # timm imports it
    return _import("timm")


def _import(name: str) -> Any:
    try:
        # For example warnings about torchvision's operators for images and video, which are not used here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"Image classification must have torchvision and timm, but there is no module `{error.name}`. "
            'Install them with `pip install "nmt-toolkit[vision]"`.'
        ) from error


def _import_without_operators() -> Any:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", _SCHEMA)
    return _import("torchvision")
