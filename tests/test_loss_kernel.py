"""The kernel of the cross-entropy beside plain operations: on a GPU, or elsewhere by Triton's interpreter."""

import pytest
import torch

# Interpreters of older releases do not run with NumPy 2.4 and newer.
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.9")

from nmt.models.loss_kernel import softmax_gradient_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("num_columns", [5, 1000, 4096, 9001])
@pytest.mark.parametrize("ignored", [None, 1])
def test_gradient_and_normaliser_are_those_of_a_softmax(num_columns: int, ignored: int | None) -> None:
    torch.manual_seed(num_columns)
    z = torch.randn(7, num_columns, device=DEVICE) * 5
    target = torch.randint(num_columns, (7,), device=DEVICE)
    target[2] = 1
    expected = z.double().softmax(dim=1)
    expected[torch.arange(7), target] -= 0.9
    if ignored is not None:
        expected[target == ignored] = 0.0
    given = z.clone()
    log_normalizers, target_logits = softmax_gradient_(given, target, extra=0.9, ignored=ignored)
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_normalizers.double(), z.double().logsumexp(dim=1), rtol=1e-6, atol=1e-5)
    assert torch.equal(target_logits, z.gather(1, target[:, None]).squeeze(1))


def test_logits_far_from_zero_do_not_overflow() -> None:
    z = torch.tensor([[1e4, 1e4 + 1, -1e4]], device=DEVICE)
    expected = z.double().softmax(dim=1)
    log_normalizers, _ = softmax_gradient_(z, torch.tensor([0], device=DEVICE), extra=0.0, ignored=None)
    torch.testing.assert_close(z.double(), expected, rtol=1e-3, atol=1e-6)
    assert log_normalizers.item() == pytest.approx(1e4 + 1.3133, abs=1e-2)
