"""Optimizers from torch."""

import inspect
from collections.abc import Iterable, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from nmt.options import OptimizationOptions

_Kind = TypeVar("_Kind", bound=type[torch.optim.Optimizer])


def _keep_compiler_out() -> None:
    """Keep torch's optimizers from importing the compiler: 65 MB and a second.

    torch imports the compiler to exclude these methods from it. If a method has the attribute `__dynamo_disable`,
    torch takes its value as the excluded form and imports nothing. This holds for the whole process, which
    compiles no optimizer.
    """
    for method in ("add_param_group", "state_dict", "load_state_dict", "zero_grad"):
        original = inspect.unwrap(getattr(torch.optim.Optimizer, method))
        original.__dynamo_disable = original


def _uncompiled(kind: _Kind) -> _Kind:
    """Return a kind of optimizer whose `step` lacks torch's wrapper, which would import the compiler."""
    step_alone = torch.no_grad()(inspect.unwrap(kind.step))
    return cast(_Kind, type(kind.__name__, (kind,), {"step": step_alone}))


_SGD, _ADAFACTOR = _uncompiled(torch.optim.SGD), _uncompiled(torch.optim.Adafactor)
_ADAM, _ADAMW = _uncompiled(torch.optim.Adam), _uncompiled(torch.optim.AdamW)


def build_optimizer(
    parameters: Iterable[nn.Parameter], options: OptimizationOptions
) -> torch.optim.Optimizer:
    """Build the optimizer over those parameters that are trained, in one group or two.

    Adam (Kingma and Ba, 2015), AdamW (Loshchilov and Hutter, 2019) and SGD are torch's fused forms, which skip
    an update on the device when their `found_inf` flag is set. Adafactor (Shazeer and Stern, 2018) has no such
    form: see `step`.
    """
    _keep_compiler_out()
    decay = options.weight_decay
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [{"params": trained, "weight_decay": decay}]
    if options.decay_matrices_only and decay:
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
    if options.optimizer == "adafactor":
        return _ADAFACTOR(groups, lr=options.lr)
    if options.optimizer == "sgd":
        optimizer = _SGD(
            groups, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov, fused=True
        )
        if options.momentum:
            # The first update begins from zeros. torch would leave the buffers unset if that update is skipped.
            for parameter in trained:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = {"adam": _ADAM, "adamw": _ADAMW}[options.optimizer]
    return kind(
        groups,
        lr=options.lr,
        betas=options.adam_betas,
        eps=options.adam_eps,
        fused=True,
        capturable=all(parameter.is_cuda for parameter in trained),  # torch's word for `can_be_recorded`
    )


def can_be_recorded(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step can be recorded (`nmt/system/cuda_graphs.py`): its learning rate may be a tensor."""
    return all(group.get("capturable", False) for group in optimizer.param_groups)


def fits(optimizer: torch.optim.Optimizer, parameter: Tensor, state: Mapping[str, Tensor]) -> bool:
    """Return whether an optimizer of this kind can go on with a parameter's state; torch does not check."""
    if not all(tensor.is_floating_point() for tensor in state.values()):
        return False
    if isinstance(optimizer, torch.optim.Adafactor):
        names = {"step", "row_var", "col_var"} if parameter.ndim > 1 else {"step", "variance"}
    elif isinstance(optimizer, torch.optim.SGD):
        names = {"momentum_buffer"}
    else:
        names = {"step", "exp_avg", "exp_avg_sq"}
    if state and state.keys() != names:  # none where a parameter has had no gradient yet
        return False
    for name, tensor in state.items():
        if name == "step":
            is_right = tensor.numel() == 1
        elif name in ("row_var", "col_var"):  # sums over rows, or over columns
            is_right = tensor.ndim == parameter.ndim and all(
                found in (1, size) for found, size in zip(tensor.shape, parameter.shape, strict=True)
            )
        else:
            is_right = tensor.shape == parameter.shape
        if not is_right:
            return False
    return True


def step(optimizer: torch.optim.Optimizer, *, is_cancelled: Tensor) -> None:
    """Make an update unless it is cancelled.

    Args:
        optimizer: From `build_optimizer`.
        is_cancelled: Scalar bool on the device. The host waits for it only with Adafactor.
    """
    if isinstance(optimizer, torch.optim.Adafactor):
        if not is_cancelled.item():
            optimizer.step()
        return
    optimizer.found_inf = is_cancelled.float()  # type: ignore[attr-defined]
    optimizer.step()
