"""Both forms of a model are held against each other where anything is not as this package has written it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.random_transformer import VOCABULARY_SIZE, random_transformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nmt.data.vocabulary import PAD_ID
from nmt.errors import UserError
from nmt.models import attention, blocks, inference, inference_parts, search_form, training_ops
from nmt.models.blocks import FeedForward
from nmt.models.inference import InferenceTransformer
from nmt.models.options import TransformerOptions
from nmt.models.transformer import DecoderLayer, Transformer
from nmt.models.untouched import is_untouched

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_linear_pointwise", "mkldnn_linear")


class _Multiplications(TorchDispatchMode):
    """Counts the numbers of the weights, or of second factors, that products read."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name.rpartition("::")[2] in _PRODUCTS:
            self.count += args[2 if "addmm" in str(function) else 1].numel()
        return function(*args, **(kwargs or {}))


def deep(num_layers: int, vocabulary_size: int = VOCABULARY_SIZE) -> Transformer:
    options = TransformerOptions(encoder_layers=num_layers, decoder_layers=num_layers, encoder_embed_dim=16)
    sizes = {"decoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "decoder_ffn_embed_dim": 32}
    options = TransformerOptions(**{**vars(options), **sizes})
    torch.manual_seed(1)
    return Transformer(
        options,
        source_vocabulary_size=vocabulary_size,
        target_vocabulary_size=vocabulary_size,
        pad_id=PAD_ID,
    ).eval()


def weights_read(model: Transformer) -> int:
    with _Multiplications() as products:
        assert search_form.search_form(model).remark is None
    return products.count


def test_of_what_nobody_has_changed_one_block_is_computed_whatever_the_size() -> None:
    one_block = 2 * 2 * 16 * 32  # two matrices in two forms
    assert weights_read(deep(1)) == weights_read(deep(4, vocabulary_size=1000)) == one_block
    model = deep(4, vocabulary_size=1000)
    model.encoder.layers[0].register_forward_hook(lambda *_: None)
    assert weights_read(model) > sum(x.numel() for x in model.parameters() if x.dim() == 2)


@pytest.mark.parametrize("seed", range(16))
def test_models_as_they_are_made_are_untouched(seed: int) -> None:
    assert is_untouched(random_transformer(seed, torch.float32))


def halved(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **options: 0.5 * function(*arguments, **options)


def halved_in_disguise(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return functools.wraps(function)(halved(function))


def halved_by_torch(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.no_grad()(halved(function))


CHANGED = [
    (DecoderLayer, "forward"),
    (FeedForward, "forward"),
    (Transformer, "features"),
    (attention, "attend"),
    (blocks, "embed"),
    (nn.Linear, "forward"),
    (nn.LayerNorm, "forward"),
    (nn.Module, "__call__"),
    (F, "linear"),
    (F, "layer_norm"),
    (training_ops, "is_elsewhere"),
    (inference_parts, "_sum"),
    (inference, "_typical_normalizer"),
]


@pytest.mark.parametrize(
    "change",
    [halved, halved_in_disguise, halved_by_torch, lambda x: mock.Mock(wraps=x), lambda _: F.silu],
    ids=["halved", "halved in disguise", "halved by torch", "wrapped", "another"],
)
@pytest.mark.parametrize(("owner", "name"), CHANGED, ids=[f"{x.__name__}.{name}" for x, name in CHANGED])
def test_a_function_in_the_place_of_another_is_noticed(
    owner: Any, name: str, change: Callable[..., Any]
) -> None:
    model = random_transformer(3, torch.float32)
    with mock.patch.object(owner, name, change(getattr(owner, name))):
        assert not is_untouched(model)
    assert is_untouched(model)


@contextmanager
def hooks_of_all_modules() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


def test_hooks_of_all_modules_are_noticed() -> None:
    model = random_transformer(3, torch.float32)
    with hooks_of_all_modules():
        assert not is_untouched(model)
    assert is_untouched(model)


CHANGES: dict[str, Callable[[Transformer], object]] = {
    "a part in training": lambda model: model.decoder.layers[0].feed_forward.dropout.train(),
    "heads of one layer": lambda model: setattr(model.decoder.layers[1].cross_attention, "num_heads", 2),
    "narrow attention": lambda model: setattr(
        model.decoder.layers[1].cross_attention, "q_proj", nn.Linear(16, 8)
    ),
    "a hook in the encoder": lambda model: model.encoder.layers[0].register_forward_hook(lambda *_: None),
    "a subclass in the encoder": lambda model: setattr(
        model.encoder.layers[0].feed_forward, "__class__", type("Gated", (FeedForward,), {})
    ),
    "a forward of its own": lambda model: setattr(model.decoder.layers[0], "forward", lambda *_, **__: None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_one_model_is_noticed(change: Callable[[Transformer], object]) -> None:
    model = random_transformer(3, torch.float32)
    change(model)
    assert not is_untouched(model)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_packed_products_that_are_wrong_on_a_machine_are_noticed(dtype: torch.dtype | None) -> None:
    model = random_transformer(3, torch.float32)
    form = InferenceTransformer(model, dtype)
    form.layers[0].feed_forward = halved(form.layers[0].feed_forward)
    with mock.patch.object(search_form, "InferenceTransformer", return_value=form):
        found, remark = search_form.search_form(model, dtype)
    assert is_untouched(model) and found is model
    assert remark is not None and "computes something else than the model" in remark


class TakesOne(nn.Module):
    """A layer or block that is called in another way than it knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("part", [nn.Identity, TakesOne])
@pytest.mark.parametrize(
    "place",
    [
        *("encoder.layers.1", "encoder.layers.0.self_attention", "encoder", "encoder.layers"),
        *("decoder.layers.1", "decoder.layers.0.self_attention", "decoder", "decoder.layers"),
        *("decoder.layers.0.cross_attention", "decoder.embedding", "decoder.layers.0.around_feed_forward"),
    ],
)
def test_a_part_that_cannot_be_called_is_named_in_a_line(place: str, part: type[nn.Module]) -> None:
    model = random_transformer(3, torch.float32)
    model.set_submodule(place, part())
    with pytest.raises(UserError) as caught:
        search_form.search_form(model)
    text = str(caught.value)
    assert "must be able to compute a batch, but ends with" in text
    assert f"Look at `{place}`, which is of the class {part.__name__} and not" in text


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_part_that_does_nothing_runs_as_it_is(stack: str) -> None:
    model = random_transformer(3, torch.float32)
    model.set_submodule(f"{stack}.layers.0.feed_forward", nn.Identity())
    form, remark = search_form.search_form(model)
    assert (form is model) == (remark is not None) == (stack == "decoder")


def test_what_only_the_fast_form_cannot_compute_runs_as_it_is() -> None:
    """Attention of half the width: the model computes it, but the products of the fast form do not fit."""
    model = random_transformer(3, torch.float32)
    for layer in model.decoder.layers:
        layer.self_attention.qkv_proj, layer.self_attention.out_proj = nn.Linear(16, 24), nn.Linear(8, 16)
    form, remark = search_form.search_form(model)
    assert form is model
    assert remark is not None and "cannot compute it (RuntimeError" in remark
