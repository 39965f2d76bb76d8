"""Read the models of a translator, and check them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from nmt.checkpoints.model_folder import load_model
from nmt.errors import UserError, shown
from nmt.generation.generator import ROWS_AT_ONCE
from nmt.models.inference_int8 import check_int8
from nmt.models.protocols import SearchModel, TranslationModel
from nmt.models.search_form import bytes_of_a_row
from nmt.translation.task import TranslationTask

Precision = Literal["fp32", "bf16", "int8"]
"""The precision of the weights in a search."""

TYPES = {"fp32": None, "bf16": torch.bfloat16, "int8": torch.int8}
_ROWS_OF_A_STEP = 1024  # tokens that are encoded at once, or hypotheses in a step


def load_models(
    paths: Sequence[Path | str], device: torch.device | str
) -> tuple[list[TranslationModel], TranslationTask]:
    """Load one or several models for one search, and the task of the first.

    Raises:
        UserError: A folder is no model folder, is damaged, or holds a model that does not translate; or the
            vocabularies of several differ.
    """
    if not paths:
        raise UserError("`path` must name a model folder, but the list is empty. Name one.")
    models, tasks = zip(*(_load(Path(path), device) for path in paths), strict=True)
    for other, other_path in zip(tasks[1:], paths[1:], strict=True):
        if (other.source_vocabulary, other.target_vocabulary) != (
            tasks[0].source_vocabulary,
            tasks[0].target_vocabulary,
        ):
            raise UserError(
                f"`{other_path}` must have the vocabularies of `{paths[0]}` to translate with it, "
                "but has others. Take models that were trained on one data directory."
            )
    return list(models), tasks[0]


def check_device(device: torch.device | str) -> None:
    """Raise a `UserError` unless torch has this device."""
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"`device` must be a device of torch, such as cpu or cuda, but is {shown(device)}."
        ) from error
    num_gpus = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= num_gpus:
        raise UserError(
            f"`device` {chosen} must be a GPU of this machine, but torch finds {num_gpus}. Use `cpu`."
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("`device` mps must be an Apple GPU, but there is none. Use `cpu`.")


def check_precision(precision: str, device: torch.device | str) -> None:
    """Raise a `UserError` unless this precision exists and this machine can compute in it."""
    if precision not in TYPES:
        raise UserError(f"`precision` must be fp32, bf16 or int8, but is {precision}.")
    if precision == "int8":
        check_int8(torch.device(device))


def _load(path: Path, device: torch.device | str) -> tuple[TranslationModel, TranslationTask]:
    loaded: tuple[Any, object] = load_model(path, device)
    model, task = loaded
    if not isinstance(task, TranslationTask):
        kind = type(model).__name__
        raise UserError(
            f"`{path}` must hold a translation model, but holds a {kind} of another task. Name another."
        )
    return model, task


def largest_of_a_step(forms: Sequence[SearchModel], models: Sequence[TranslationModel]) -> int:
    """Return the size in bytes of the largest new tensor of each step, for batches of usual size."""
    sizes = []
    for form, model in zip(forms, models, strict=True):
        of_logits, of_others = bytes_of_a_row(form, model)
        if len(models) > 1:  # the logits of several models are stacked, in float32
            of_logits = 4 * len(models) * model.output_weight.size(0)
        sizes += [ROWS_AT_ONCE["cpu"] * of_logits, _ROWS_OF_A_STEP * of_others]
    # PyTorch asks for 2 MB more if tensors begin at huge pages, and glibc for a little more.
    return max(sizes) + 2**21 + 2**16
