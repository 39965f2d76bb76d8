"""Count the floating-point operations of matrix products while they are made."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nmt.system.onednn import operator_of_products


class FlopCounter(TorchDispatchMode):
    """Counts the operations of the products in its block, two per multiply-add, the backward pass included.

        with FlopCounter() as counter:
            loss = model(x).sum()
            loss.backward()
        counter.total

    The formulas are PyTorch's (`torch.utils.flop_counter`), with oneDNN's product beside them. PyTorch's own
    `FlopCounterMode` tells modules apart, which nobody asks for here, and imports its compiler: 65 MB and a
    second. Operators that take functions (`torch.cond`) run, and are not counted.
    """

    supports_higher_order_operators = True  # or PyTorch refuses to run them here

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell PyTorch not to wrap `__torch_dispatch__`: the wrapper is what imports the compiler."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and add what it took."""
        kwargs = kwargs or {}
        formula = None
        if isinstance(func, torch._ops.OpOverload):
            formula = _FORMULAS.get(func.overloadpacket)
            if formula is None:
                with self:  # its parts: without autograd, `linear` comes here as a whole
                    out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def _of_linear(x: torch.Tensor, *_: Any, out_val: torch.Tensor, **__: Any) -> int:
    return 2 * math.prod(out_val.shape) * x.size(-1)


_FORMULAS: dict[Any, Callable[..., int]] = dict(flop_registry)
if (_product := operator_of_products()) is not None:
    _FORMULAS[_product] = _of_linear
