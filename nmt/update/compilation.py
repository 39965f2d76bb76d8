"""Models that are compiled for their updates (`--compile`): torch.compile around what their layers compute.

Only the model's forward is compiled. The loss, precision, DDP and the names of the weights stay as they are. So do
validation and decoding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from nmt.errors import UserError

_REMEDY = "Leave it out."


def compile_model(model: nn.Module, *, has_one_shape: bool) -> None:
    """Let torch compile, in place, what a model computes in updates. torch does so at the first call.

    Args:
        model: Its weights keep their names.
        has_one_shape: All examples have one shape, so that a program for each batch size is worth compiling.
            Otherwise there is one program for all shapes.

    Raises:
        UserError: torch compiles nothing under this Python.
    """
    # DDP wraps the model and waits for the gradients of the whole program. Cutting the program at DDP's buckets
    # would send some gradients earlier, but torch cannot do so with shapes that vary.
    torch._dynamo.config.optimize_ddp = False
    plain = model.forward
    compiled = _compiled(plain, dynamic=not has_one_shape)
    # `forward` is replaced in the instance. Wrapping the module would change the names of its weights, and
    # compiling its call would draw its hooks into the program.
    model.forward = _in_updates(model, compiled, plain)


def compile_layers(model: nn.Module) -> None:
    """Let torch compile, in place, each layer of a model's stacks for inputs that are all of one shape.

    The layers of a stack share one program, so that compiling takes a fraction of what the whole would.

    Args:
        model: Every module in its lists of modules counts as a layer.

    Raises:
        UserError: torch compiles nothing under this Python.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layer in (layer for stack in stacks for layer in stack):
        layer.forward = _in_updates(layer, _compiled(layer.forward, dynamic=False), layer.forward)


def _compiled(function: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
    try:
        return torch.compile(function, dynamic=dynamic)
    except RuntimeError as error:
        raise UserError(f"`compile` must be off here: {_first_sentence(error)}. {_REMEDY}") from error


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let compiled models run uncompiled within the block, so that hooks and counters see every call."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def compile_failures(is_compiled: bool) -> Iterator[None]:
    """Turn torch's errors of compilation into one line.

    Raises:
        UserError: There is no compiler, or the model cannot be compiled.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_compiled or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        causes = {type(cause).__name__: cause for cause in _causes(error)}
        if "InvalidCxxCompiler" in causes:
            raise UserError(
                "`compile` must have a C++ compiler (g++, clang++, or what CXX names), but there "
                "is none. Install one, or leave it out."
            ) from error
        for name, package in (("TritonMissing", "Triton"), ("GPUTooOldForTriton", "a newer GPU for Triton")):
            if name in causes:
                raise UserError(f"`compile` must have {package} here, but has not. {_REMEDY}") from error
        deepest = list(causes.values())[-1]
        raise UserError(
            "`compile` must be off where torch cannot compile the model, but it says: "
            f"{_first_sentence(deepest)}. {_REMEDY}"
        ) from error


def _in_updates(
    module: nn.Module, compiled: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    @wraps(plain)  # says that it computes the same
    def forward(*args: Any, **kwargs: Any) -> Any:
        is_update = module.training and torch.is_grad_enabled()
        return (compiled if is_update else plain)(*args, **kwargs)

    return forward


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = getattr(seen, "inner_exception", None) or seen.__cause__ or seen.__context__


def _first_sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
