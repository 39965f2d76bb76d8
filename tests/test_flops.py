"""The counter of products, by hand and against PyTorch's own."""

import pytest
import torch
from support.pair_task import ALL, SIZES, PairTask, collate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nmt.models.transformer import Transformer
from nmt.run.flops import FlopCounter


def test_a_product_takes_two_operations_a_multiply_add_forward_and_two_such_products_backward() -> None:
    linear = nn.Linear(3, 5)
    x = torch.randn(7, 3, requires_grad=True)
    with FlopCounter() as forward:
        y = linear(x)
    with FlopCounter() as both:
        linear(x).sum().backward()
    assert y.shape == (7, 5)
    assert forward.total == 2 * 7 * 3 * 5
    assert both.total == 3 * forward.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_transformers_count_is_that_of_pytorchs_counter_whatever_makes_the_products(
    dtype: torch.dtype,
) -> None:
    """oneDNN makes those in float32, which PyTorch's counter does not know: it counts in float64."""
    model = Transformer(SIZES, source_vocabulary_size=15, target_vocabulary_size=15, pad_id=1).double()
    batch = collate(ALL)
    with FlopCounterMode(display=False) as expected:
        PairTask().compute_loss(model, batch).loss.backward()
    model.to(dtype)
    with FlopCounter() as counter:
        PairTask().compute_loss(model, batch).loss.backward()
    assert counter.total == expected.get_total_flops() > 0


def test_what_runs_without_autograd_is_counted_too() -> None:
    linear = nn.Linear(3, 5)
    with FlopCounter() as counter, torch.inference_mode():
        linear(torch.randn(7, 3))
    assert counter.total == 2 * 7 * 3 * 5


def test_an_operator_that_takes_functions_runs() -> None:
    x = torch.tensor([3.0])
    with FlopCounter(), torch.no_grad():
        branch = torch.ops.higher_order.cond(torch.tensor(True), torch.sin, torch.cos, (x,))
    assert torch.equal(branch, x.sin())
