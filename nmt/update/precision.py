"""The type that updates compute in.

Parameters stay in float32 (or what the model was made in): the optimizer updates them, DDP sums their
gradients, checkpoints save them. In bf16 and fp16 each micro-batch is computed with copies of them in that type.
The copies are made by autograd, which turns their gradients back to float32: sums over micro-batches and ranks are
in float32 too.

Validation, and all else that uses the model outside an update, computes with the parameters themselves: what is
measured is what is saved.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# As torch.amp.GradScaler: begin high, halve on an overflow, double after this many updates without one.
_FIRST_SCALE = 2.0**16
# If the mean gradient overflows without any scale, a lower scale would hide the fault instead of showing it.
_LOWEST_SCALE = 1.0
_GROWTH_INTERVAL = 2000


class Precision:
    """The type that updates compute in, and for float16 the scale that keeps small gradients from vanishing.

    The scale lives on the device and follows a flag there: nothing is read back by the host.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.dtype = _TYPES[_resolve(name, device)]
        self._scale: Tensor | None = None
        if self.dtype == torch.float16:
            self._scale = torch.full((), _FIRST_SCALE, device=device)
            self._num_good = torch.zeros((), dtype=torch.int32, device=device)
        self._is_never = torch.zeros((), dtype=torch.bool, device=device)

    def wrap(self, objective: nn.Module, model: nn.Module, *, casts_weights: bool = True) -> nn.Module:
        """Return a module that computes what `objective` does, with the parameters in this type.

        Args:
            objective: a module that holds `model`.
            model: its inputs are turned to the type and its outputs to float32, so that a task computes its loss
                in float32.
            casts_weights: False if somebody else turns the parameters to the type, as FSDP does.
        """
        if self.dtype == torch.float32:
            return objective
        return _InLowPrecision(objective, model, self.dtype, casts_weights=casts_weights)

    def copy_of(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model in this type; in fp32 the model itself."""
        return model if self.dtype == torch.float32 else copy.deepcopy(model).to(self.dtype)

    def scale(self, factor: Tensor) -> Tensor:
        """Scale the factor of the loss."""
        return factor if self._scale is None else factor * self._scale

    def unscale_(self, gradients: Sequence[Tensor]) -> None:
        """Undo in the gradients what `scale` did."""
        if self._scale is not None:
            # The scale is a power of two: both it and its inverse are exact.
            torch._foreach_mul_(list(gradients), self._scale.reciprocal())

    def can_lower_scale(self) -> Tensor:
        """Return whether the scale alone may be the reason for a gradient that is not finite: scalar bool."""
        return self._is_never if self._scale is None else self._scale > _LOWEST_SCALE

    def adapt_(self, is_cancelled: Tensor) -> None:
        """Lower the scale, to 1 at most, if the update overflowed; raise it after a long time without an overflow.

        Args:
            is_cancelled: scalar bool on the device, the same on every rank.
        """
        if self._scale is not None:
            torch._amp_update_scale_(
                self._scale, self._num_good, is_cancelled.float(), 2.0, 0.5, _GROWTH_INTERVAL
            )
            self._scale.clamp_(min=_LOWEST_SCALE)

    def state_dict(self) -> dict[str, Any]:
        """Return the scale in JSON types; empty where there is none."""
        if self._scale is None:
            return {}
        return {"scale": self._scale.item(), "num_good": int(self._num_good.item())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a scale; a run that had none begins with the initial scale."""
        if self._scale is not None and state:
            self._scale.fill_(state["scale"])
            self._num_good.fill_(state["num_good"])


def _resolve(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bfloat16 else "fp32"


class _InLowPrecision(nn.Module):
    def __init__(
        self, objective: nn.Module, model: nn.Module, dtype: torch.dtype, *, casts_weights: bool
    ) -> None:
        super().__init__()
        self.objective = objective
        self.dtype = dtype
        self._model = [model]  # in a list, so that it is not registered a second time
        # Batch norm keeps its parameters in float32, like its statistics. So it takes inputs of other types.
        kept = {id(p) for m in model.modules() if isinstance(m, _NormBase) for p in m.parameters()}
        self._names = {
            name
            for name, p in objective.named_parameters()
            if casts_weights and p.is_floating_point() and id(p) not in kept
        }

    def forward(self, batch: Any) -> Any:
        parameters = self.objective.named_parameters()
        copies = {name: p.to(self.dtype) for name, p in parameters if name in self._names}
        (model,) = self._model
        hooks = [
            model.register_forward_pre_hook(self._lower_inputs, with_kwargs=True),
            model.register_forward_hook(self._raise_outputs),
        ]
        try:
            return functional_call(self.objective, copies, (batch,))
        finally:
            for hook in hooks:
                hook.remove()

    def _lower_inputs(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        return _convert((args, kwargs), self.dtype)

    def _raise_outputs(self, _: nn.Module, args: Any, outputs: Any) -> Any:
        return _convert(outputs, torch.float32)


def _convert(tree: Any, dtype: torch.dtype) -> Any:
    """Convert the floating-point tensors in nested tuples, lists and dictionaries."""

    def convert(leaf: Any) -> Any:
        is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if is_float else leaf

    return _pytree.tree_map(convert, tree)
