"""Layers of packed rows by our own kernels, beside the plain modules: on a GPU, or by Triton's interpreter."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.packed_pairs import make_pairs, shape_for
from support.packed_updates import CPU, GPU, assert_close, make_trainer, trained, updates
from support.toy_run import assert_bit_equal
from torch import Tensor, nn

# Interpreters of older releases do not run with NumPy 2.4 and newer.
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.9")

from nmt.data.packing import PackedTranslationBatch, pack_pairs
from nmt.data.vocabulary import PAD_ID
from nmt.models import norm_kernels, packed_layers
from nmt.models.attention import SelfAttention
from nmt.models.blocks import FeedForward, Residual
from nmt.models.options import TransformerOptions
from nmt.models.packed import Spans
from nmt.models.training_ops import Linear
from nmt.models.transformer import EncoderLayer, Transformer
from nmt.system import cuda_graphs as recording
from nmt.system.determinism import deterministic_algorithms
from nmt.translation.loss import packed_translation_loss

DEVICE = GPU if torch.cuda.is_available() else CPU
LENGTHS = [(3, 4), (7, 5), (2, 9), (12, 11), (1, 1), (6, 6)]
NUM_SUBLAYERS = 2 * 2 + 3  # encoder's, decoder's


@pytest.fixture
def num_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let our kernels work anywhere; count the sublayers that they compute, call by call."""
    runs: list[int] = []
    plain = packed_layers.run

    def run(x: Tensor, layers: Any) -> Tensor:
        runs.append(sum(map(len, layers)))
        return plain(x, layers)

    monkeypatch.setattr(packed_layers, "have_kernels", lambda *_: True)
    monkeypatch.setattr(packed_layers, "run", run)
    yield runs


def make_model(*, dropout: float = 0.0, **options: Any) -> Transformer:
    torch.manual_seed(5)
    sizes: dict[str, Any] = {
        "encoder_layers": 2,
        "decoder_layers": 1,
        **{f"{side}_embed_dim": 24 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_embed_dim": 40 for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    }
    model = Transformer(
        TransformerOptions(**{**sizes, "dropout": dropout, **options}),
        source_vocabulary_size=14,
        target_vocabulary_size=14,
        pad_id=PAD_ID,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and normalisations that are not zeros and ones
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.to(DEVICE).train()


def make_batch() -> PackedTranslationBatch:
    return pack_pairs(make_pairs(LENGTHS), shape_for(LENGTHS, slack=6)).to(DEVICE)


def loss_and_gradients(model: Transformer, *, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    output = packed_translation_loss(model, make_batch(), label_smoothing=0.1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output.loss, parameters)
    return {"loss": output.loss.detach(), **dict(zip(names, gradients, strict=True))}


def without_kernels(model: Transformer, **options: Any) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_layers, "have_kernels", lambda *_: False)
        return loss_and_gradients(model, **options)


PRE_NORM = {"encoder_normalize_before": True, "decoder_normalize_before": True}


@pytest.mark.parametrize(
    "options",
    [
        {},
        PRE_NORM,
        {"decoder_normalize_before": True, "activation_fn": "gelu"},
        {"activation_checkpointing": True},
        {**PRE_NORM, "activation_checkpointing": True},
        {"decoder_embed_dim": 16},
    ],
)
def test_loss_and_gradients_are_those_of_the_modules(options: dict[str, Any], num_runs: list[int]) -> None:
    model = make_model(**options)
    found, wanted = loss_and_gradients(model), without_kernels(model)
    # Layers that are computed again are run one by one, and once more.
    recomputes = model.encoder.activation_checkpointing
    assert sorted(num_runs) == ([2, 2, 2, 2, 3, 3] if recomputes else [3, 4])
    assert_close(found, wanted, 2e-4)


@pytest.mark.parametrize("options", [{}, PRE_NORM])
def test_dropout_draws_anew_each_time_but_the_same_when_layers_are_computed_again(
    options: dict[str, Any], num_runs: list[int]
) -> None:
    model = make_model(dropout=0.3, activation_dropout=0.2, **options)
    one, again, other = (loss_and_gradients(model, seed=seed) for seed in (1, 1, 2))
    assert_close(one, again, 1e-6)
    assert not torch.equal(one["loss"], other["loss"])
    for part in (model.encoder, model.decoder):
        part.activation_checkpointing = True
    assert_close(loss_and_gradients(model, seed=1), one, 1e-6)


def test_dropout_leaves_the_mean_as_it_is(num_runs: list[int]) -> None:
    """Of an output that is linear in what is dropped: the sum of the first residual connection."""
    model = make_model(dropout=0.4, **PRE_NORM)
    (layer,) = model.decoder.layers
    x, product = torch.randn(1, 100, 24, device=DEVICE), torch.randn(100, 24, device=DEVICE)
    layers = [[(layer.around_feed_forward, lambda _: _product_of(product))]]
    torch.manual_seed(0)
    dropped = torch.stack([packed_layers.run(x, layers) for _ in range(4)]) - x
    kept = dropped / product
    # Kept numbers are 1 / 0.6, with a standard deviation of sqrt(0.4 / 0.6) over 9,600.
    assert kept.mean().item() == pytest.approx(1.0, abs=0.03)
    wanted = x + product
    layer.eval()
    torch.manual_seed(0)
    expected = torch.rand(1, device=DEVICE)
    torch.manual_seed(0)
    torch.testing.assert_close(packed_layers.run(x, layers), wanted)
    assert torch.equal(torch.rand(1, device=DEVICE), expected)  # nothing is drawn where nothing is dropped


def _product_of(rows: Tensor) -> Any:
    return norm_kernels.Product(rows, rows.new_zeros(rows.size(1)))


class OtherNorm(nn.LayerNorm):
    """Doubles."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def set_activation_module(layer: EncoderLayer) -> None:
    layer.feed_forward.activation = nn.ReLU()


def give_forward(layer: EncoderLayer) -> None:
    plain = layer.feed_forward.contract.forward
    layer.feed_forward.contract.forward = lambda x: 3 * plain(x)  # type: ignore[method-assign]


STRANGE: dict[str, Callable[[EncoderLayer], Any]] = {
    "a norm of another class": lambda layer: setattr(layer.around_attention, "norm", OtherNorm(24)),
    "RMSNorm": lambda layer: setattr(layer.around_attention, "norm", nn.RMSNorm(24)),
    "no norm": lambda layer: setattr(layer.around_feed_forward, "norm", nn.Identity()),
    "a norm without weights": lambda layer: setattr(
        layer.around_attention, "norm", nn.LayerNorm(24, elementwise_affine=False)
    ),
    "a norm without a bias": lambda layer: setattr(
        layer.around_attention, "norm", nn.LayerNorm(24, bias=False)
    ),
    "a hook on a norm": lambda layer: layer.around_attention.norm.register_forward_hook(
        lambda *args: 2 * args[2]
    ),
    "a hook before a connection": lambda layer: layer.around_attention.register_forward_pre_hook(
        lambda _, args: (2 * args[0], args[1])
    ),
    "a hook on a gradient": lambda layer: layer.feed_forward.expand.register_full_backward_hook(
        lambda _, grads, __: (2 * grads[0],)
    ),
    "an activation module": set_activation_module,
    "a forward of its own": give_forward,
    "a layer without a bias": lambda layer: setattr(layer.feed_forward, "expand", Linear(24, 40, bias=False)),
    "no dropout": lambda layer: setattr(layer.around_attention, "dropout", nn.Identity()),
    "another block": lambda layer: setattr(
        layer, "feed_forward", nn.Sequential(nn.Linear(24, 24), nn.Tanh())
    ),
    "one part more": lambda layer: layer.add_module("more", nn.Identity()),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_a_layer_with_a_part_of_another_kind_runs_as_it_is(strange: str, num_runs: list[int]) -> None:
    model = make_model()
    torch.manual_seed(1)
    STRANGE[strange](model.encoder.layers[0])
    model.to(DEVICE)
    found = loss_and_gradients(model)
    assert sum(num_runs) == NUM_SUBLAYERS - 2
    assert_close(found, without_kernels(model), 2e-4)


@pytest.mark.parametrize("owner", [nn.LayerNorm, Linear, Residual, FeedForward, SelfAttention])
def test_a_method_of_somebody_else_is_called(
    owner: type[nn.Module], num_runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = owner.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return 2 * plain(self, *args, **kwargs)

    model = make_model()
    for function in (forward, wraps(plain)(forward)):
        monkeypatch.setattr(owner, "forward", function)
        assert_close(loss_and_gradients(model), without_kernels(model), 2e-4)
    assert not num_runs


class DoublingLayer(EncoderLayer):
    """Doubles."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


def test_layers_with_something_around_them_run_one_by_one(num_runs: list[int]) -> None:
    model = make_model()
    model.encoder.layers[0].register_forward_hook(lambda *args: 2 * args[2])
    found = [loss_and_gradients(model)]
    model.encoder.layers[0] = make_model().encoder.layers[0]
    model.encoder.layers[0].__class__ = DoublingLayer
    found.append(loss_and_gradients(model))
    assert sorted(num_runs) == [2, 2, 2, 2, 3, 3]
    for ours in found:
        assert_close(ours, without_kernels(model), 2e-4)


def test_any_function_may_be_the_activation(num_runs: list[int]) -> None:
    model = make_model()
    model.encoder.layers[0].feed_forward.activation = lambda x: F.relu(x).square()
    found = loss_and_gradients(model)
    assert sum(num_runs) == NUM_SUBLAYERS
    assert_close(found, without_kernels(model), 2e-4)


def can_run(dtype: torch.dtype = torch.float32, *, has_layer_kernels: bool = True) -> bool:
    spans = Spans(None, None, has_layer_kernels=has_layer_kernels)  # type: ignore[arg-type]
    return packed_layers.can_run(make_model().encoder.layers[0], torch.zeros(1, 2, 24, dtype=dtype), spans)


def test_what_our_kernels_are_not_for_is_left_to_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_run()
    assert not can_run(has_layer_kernels=False)
    assert not can_run(torch.float64)  # weights are of another type
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not can_run()


def test_kernels_are_tried_out_apart_from_layers_that_are_computed_again(
    num_runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward pass within such a layer would compute it again, and so without end."""

    def have_kernels(dtype: torch.dtype, width: int, device: torch.device) -> bool:
        norm_kernels.try_out(dtype, width, device)
        return True

    monkeypatch.setattr(packed_layers, "have_kernels", have_kernels)
    model = make_model(activation_checkpointing=True)
    assert_close(loss_and_gradients(model), without_kernels(model), 2e-4)


def test_updates_by_kernels_are_the_plain_ones(num_runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trained(make_trainer(DEVICE, precision="fp32"), updates(count=3))
    assert num_runs
    monkeypatch.setattr(packed_layers, "have_kernels", lambda *_: False)
    assert_close(ours, trained(make_trainer(DEVICE, precision="fp32"), updates(count=3)), 2e-4)


def test_kernels_that_do_not_work_are_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def try_out(*_: Any) -> None:
            raise RuntimeError("no triton here\nFailed to find C compiler")

    for name in ("_linear_kernels", "_norm_kernels"):
        with monkeypatch.context() as patch:
            patch.setattr(packed_layers, "_linear_kernels", _Working)
            patch.setattr(packed_layers, name, Broken)
            patch.setattr(torch.cuda, "synchronize", lambda _: None)
            packed_layers.have_kernels.cache_clear()
            with pytest.warns(
                UserWarning,
                match=r"kernel of layers does not work here \(Failed to find C",
            ):
                assert not packed_layers.have_kernels(torch.bfloat16, 64, GPU)
            # Nothing to be told: they are for rows of some width in half precision on a GPU.
            for given in ((torch.float32, 64, GPU), (torch.bfloat16, 64, CPU), (torch.bfloat16, 8192, GPU)):
                assert not packed_layers.have_kernels(*given)
    packed_layers.have_kernels.cache_clear()


class _Working:
    @staticmethod
    def try_out(*_: Any) -> None:
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("model", [{}, PRE_NORM, {"activation_fn": "gelu"}])
def test_updates_by_kernels_are_the_plain_ones_on_a_gpu(
    precision: str, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packed_layers.have_kernels(torch.bfloat16, 32, torch.device("cuda", 0))
    ours = trained(make_trainer(GPU, precision=precision, model=model), updates())
    monkeypatch.setattr(packed_layers, "have_kernels", lambda *_: False)
    assert_close(ours, trained(make_trainer(GPU, precision=precision, model=model), updates()), 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [{}, PRE_NORM])
def test_recorded_updates_by_kernels_are_the_plain_ones_bit_by_bit(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"dropout": 0.3, "activation_dropout": 0.1, "attention_dropout": 0.1, **model}
    found = []
    for num_plain_calls in (2, 1000):
        monkeypatch.setattr(recording, "_NUM_PLAIN_CALLS", num_plain_calls)
        with deterministic_algorithms(True):
            found.append(trained(make_trainer(GPU, precision="bf16", model=given), updates(count=12)))
    assert_bit_equal(*found)
