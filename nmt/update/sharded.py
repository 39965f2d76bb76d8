"""Sharded weights: each rank keeps a part of every weight, of its gradient and of the optimizer's state.

This is FSDP2 (`torch.distributed.fsdp.fully_shard`), the third stage of ZeRO (Rajbhandari et al., 2020). The rows
of each weight are dealt to the ranks. A layer's weights are gathered when it computes, forward and backward, and
are freed after it. Its gradients are summed over the ranks, and each rank keeps the sum of its own rows.

    rank 0   rows 0-3 of each weight | its gradient | Adam's means        layer 1: gather, compute, free
    rank 1   rows 4-7                | its gradient | Adam's means        layer 2: gather, compute, free ...

The optimizer sees the rows of this rank as plain tensors, and knows nothing of FSDP. Validation and decoding take
a plain model, for which the weights are gathered as a whole.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nmt.checkpoints.weights import weights
from nmt.distributed import World
from nmt.errors import UserError
from nmt.task import Batch, LossOutput, Task
from nmt.update.objective import Objective
from nmt.update.precision import Precision

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_REMEDY = "Leave it out."


class Sharded:
    """Keeps a part of everything on each of several ranks.

    Gradients are summed over the ranks after each micro-batch, so that no rank ever holds a whole one.
    """

    can_run_alone = False
    loss_factor = 1.0
    num_copies = 0  # the gradients of a layer at a time

    def __init__(self, task: Task[Any], model: nn.Module, precision: Precision, world: World) -> None:
        """Deal out the weights of a model, which is on the world's device.

        Raises:
            UserError: The model has weights that cannot be dealt out, or leaves out layers.
        """
        if not getattr(model, "is_whole", True):
            raise UserError(
                "`shard-weights` must go without LayerDrop, by which each rank would gather other layers than the "
                f"others. {_REMEDY}"
            )
        for tensor in weights(model).values():
            world.copy_from_main_(tensor)
        plain = _without_content(model)
        root = _Root(Objective(task, model))
        self._mesh = world.mesh()
        _shard(root, model, self._mesh, dtype=precision.dtype)
        self.weights = WeightParts(model, plain, world)
        self.objective = precision.wrap(_AsLossOutput(root), model, casts_weights=False)
        # FSDP puts gradients into these parameters of its own. `gradients` hands their parts to the optimizer's.
        self._sharded = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._precision = precision
        self._world = world

    def start(self) -> None:
        """Take rank 0's statistics, as DDP does; those of the other ranks are not used."""
        for tensor in self.weights.statistics:
            self._world.copy_from_main_(tensor)

    def add(self, batch: Batch, factor: Tensor, *, is_last: bool) -> LossOutput:
        """Run forward and backward, together with the other ranks."""
        output: LossOutput = self.objective(batch.to(self._world.device))
        (output.loss * self._precision.scale(factor)).backward()
        return output

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """Return this rank's rows of each gradient, and give them to what the optimizer steps."""
        found = []
        for name, parameter in self._sharded.items():
            gradient = None if parameter.grad is None else _local(parameter.grad)
            self.weights.trained[name].grad = gradient
            if gradient is not None and gradient.numel():
                found.append(gradient)
        return found

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of the whole gradient, from the sum of the squares of all ranks."""
        own = nn.utils.get_total_norm(gradients).to(self._world.device)
        return self._world.sum_(own.to(self._world.sum_dtype).square()).sqrt().to(own.dtype)

    def clear(self) -> None:
        """Free the gradients."""
        for name, parameter in self._sharded.items():
            parameter.grad = self.weights.trained[name].grad = None

    def give_back(self) -> None:
        """Nothing is to be done: what was used is free for all."""

    def close(self) -> None:
        """Let go of FSDP, which keeps the process group."""
        self.objective = nn.Identity()
        self._sharded = {}
        # PyTorch caches how it handles sharded tensors as long as the process lives. That keeps their mesh, too.
        getattr(self._mesh, "_pg_registry", {}).clear()


class WeightParts:
    """Each rank keeps the same number of rows of every parameter; the last ranks may keep fewer."""

    def __init__(self, sharded: nn.Module, plain: nn.Module, world: World) -> None:
        """Take the parts of a model that FSDP has dealt out.

        Args:
            sharded: The model.
            plain: The model without FSDP. Its parameters have no content, its buffers are those of the model.
            world: The ranks.
        """
        self._plain, self._world = plain, world
        self._sizes = weights(plain)
        with torch.no_grad():
            self._parts = {
                name: nn.Parameter(_local(p), requires_grad=p.requires_grad)
                for name, p in sharded.named_parameters()
            }
        self.trained: Mapping[str, nn.Parameter] = {
            name: part for name, part in self._parts.items() if part.requires_grad
        }
        self.statistics = [value for name, value in self._sizes.items() if name not in self._parts]

    def tensors(self) -> dict[str, Tensor]:
        """Return this rank's rows of each parameter, and the statistics."""
        return {
            name: self._parts[name].detach() if name in self._parts else value
            for name, value in self._sizes.items()
        }

    def sizes(self) -> dict[str, Tensor]:
        """Return parameters without content, and the statistics."""
        return self._sizes

    def whole(self, name: str, kept: Tensor) -> Tensor:
        """Gather the rows of all ranks."""
        part = self._parts.get(name)
        if part is None or kept.shape != part.shape:  # statistics, or the optimizer's count of its steps
            return kept
        return self._world.join_rows(kept, self._sizes[name].size(0))

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return a copy of this rank's rows."""
        if name not in self._parts or whole.shape != self._sizes[name].shape:
            return whole
        return whole[self._world.own_rows(whole.size(0))].clone()

    @contextmanager
    def in_one_model(self) -> Iterator[nn.Module]:
        """Return the plain model with the weights of all ranks. There must be memory for them within the block."""
        with torch.no_grad():
            wholes = {
                name: nn.Parameter(self.whole(name, part.detach()), requires_grad=False)
                for name, part in self._parts.items()
            }
        empty = dict(self._plain.named_parameters())
        _replace_parameters(self._plain, {empty[name]: whole for name, whole in wholes.items()})
        try:
            yield self._plain
        finally:
            _replace_parameters(self._plain, {whole: empty[name] for name, whole in wholes.items()})


class _Root(nn.Module):
    """Returns the loss and the sums of an objective as a tuple, in which FSDP finds the tensors."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch) -> tuple[Tensor, Any]:
        output: LossOutput = self.objective(batch)
        return output.loss, output.sums


class _AsLossOutput(nn.Module):
    """Calls a `_Root`, and puts its results together again."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root

    def forward(self, batch: Batch) -> LossOutput:
        cause = None
        try:
            loss, sums = self.root(batch)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            cause = error
        if cause is not None or _is_dealt_out(loss):
            raise UserError(
                "`shard-weights` must be off for a model, or a loss, that uses a layer's weights without calling "
                f"the layer, as this one does. {_REMEDY}"
            ) from cause
        return LossOutput(loss, sums)


def _shard(root: nn.Module, model: nn.Module, mesh: "DeviceMesh", *, dtype: torch.dtype) -> None:
    """Let FSDP deal out the weights of each part of a model, and of the rest together."""
    from torch.distributed.fsdp import (  # it takes more than a second to import
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise UserError(
                f"`shard-weights` must be off for a model with scalars, such as `{name}`. {_REMEDY}"
            )
    # From torch 2.13 on. Nothing is added to keys and values in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPCrossAttention\) returned a view")
    is_low = dtype != torch.float32
    as_it_is = MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = as_it_is
    if is_low:  # weights are gathered in this type, gradients summed in float32
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for part in [*parts(model, with_batch_norm=is_low), root]:
        keeps_type = isinstance(part, _NormBase)  # see `Precision.wrap`
        fully_shard(part, mesh=mesh, mp_policy=as_it_is if keeps_type else policy)
        for entrance in getattr(part, "entrances", ()):
            register_fsdp_forward_method(part, entrance)
        # The loss has been divided already, so FSDP must only sum.
        cast(FSDPModule, part).set_gradient_divide_factor(1.0)
        cast(FSDPModule, part).set_force_sum_reduction_for_comms(True)


def parts(model: nn.Module, *, with_batch_norm: bool) -> list[nn.Module]:
    """Return the parts of a model whose weights are gathered and freed together, inner parts first.

    They are the layers of its stacks, and modules with more entrances than `forward`. A module that shares a
    parameter with another one is no part of its own: it belongs to the rest.

    Args:
        model: Every module in a list or sequence of modules counts as a layer.
        with_batch_norm: Batch norms are parts too.
    """
    num_places = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    found: list[nn.Module] = []

    def visit(module: nn.Module, *, is_in_layer: bool) -> None:
        for child in module.children():
            is_layer = isinstance(module, (nn.ModuleList, nn.Sequential)) and not is_in_layer
            is_layer &= type(child).forward is not nn.Module.forward
            visit(child, is_in_layer=is_in_layer or is_layer)
            is_part = (
                is_layer or hasattr(child, "entrances") or (with_batch_norm and isinstance(child, _NormBase))
            )
            parameters = list(child.parameters())
            if is_part and parameters and all(num_places[p] == 1 for p in parameters):
                found.append(child)

    visit(model, is_in_layer=False)
    return found


def _without_content(model: nn.Module) -> nn.Module:
    """Return a copy of a model. Its parameters have sizes but no content; its buffers are the model's own."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo | {id(buffer): buffer for buffer in model.buffers()})


def _replace_parameters(model: nn.Module, by_old: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Replace a model's parameters by others; a tied one in all of its places."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, by_old[parameter])


def _is_dealt_out(tensor: Tensor) -> bool:
    """Return whether a tensor is one of FSDP's, of which each rank has a part."""
    return hasattr(tensor, "to_local")


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this rank."""
    return cast(Any, tensor).to_local()
