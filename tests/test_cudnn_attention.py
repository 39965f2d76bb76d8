"""Which kernels may compute attention."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend

from nmt import distributed
from nmt.models import static_decoder
from nmt.system.cudnn_attention import leave_out_cudnn_attention


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def test_cudnn_is_left_out_and_all_others_stay() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    leave_out_cudnn_attention()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def test_a_run_on_a_gpu_begins_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    with distributed.join_world("cuda"):
        assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_search_in_place_never_asks_for_it() -> None:
    assert SDPBackend.CUDNN_ATTENTION not in static_decoder._ATTENTION
    torch.backends.cuda.enable_cudnn_sdp(True)
    with static_decoder.without_cudnn():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
