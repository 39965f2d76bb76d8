"""Variants of the Transformer's parts: their formulas, the fast search with them, and who does not know them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.id_search import padded, search
from support.pair_task import PairTask, collate
from support.random_transformer import VOCABULARY_SIZE
from support.ranks import run_ranks
from torch import Tensor, nn

from nmt.data.batch_iterator import MicroBatch
from nmt.data.vocabulary import PAD_ID
from nmt.distributed import World, single
from nmt.errors import UserError
from nmt.generation.static_search import static_search
from nmt.models import known_parts
from nmt.models.blocks import RESIDUALS, GatedFeedForward, Residual, left_in, make_norm
from nmt.models.inference import InferenceTransformer
from nmt.models.known_parts import find_stranger, why_padded
from nmt.models.options import TransformerOptions
from nmt.models.search_form import search_form
from nmt.models.transformer import Transformer
from nmt.options import OptimizationOptions
from nmt.trainer import Trainer

SMALL = TransformerOptions(
    encoder_layers=2,
    decoder_layers=3,
    encoder_embed_dim=16,
    decoder_embed_dim=24,
    encoder_ffn_embed_dim=20,
    decoder_ffn_embed_dim=28,
    encoder_attention_heads=2,
    decoder_attention_heads=4,
)
GATED, RMS = {"activation_fn": "swiglu"}, {"norm_fn": "rms"}
PRE_NORM = {"encoder_normalize_before": True, "decoder_normalize_before": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "gated": GATED,
    "rms": RMS,
    "both": GATED | RMS,
    "both pre-norm": GATED | RMS | PRE_NORM,
    "rms around embeddings": RMS | {"layernorm_embedding": True},
    "all": GATED | RMS | PRE_NORM | {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
}
SENTENCES = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
CPU = single(torch.device("cpu"))


def variant(changes: dict[str, Any], dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Transformer:
    torch.manual_seed(1)
    sizes = {f"{side}_vocabulary_size": VOCABULARY_SIZE for side in ("source", "target")}
    model = replace(SMALL, **changes).build(**sizes, pad_id=PAD_ID)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale) if parameter.dim() > 1 else parameter.add_(
                0.3 * torch.randn_like(parameter)
            )
    return model.to(dtype).eval()


def test_a_gate_multiplies_what_it_lets_through() -> None:
    torch.manual_seed(1)
    block = GatedFeedForward(3, 2, options=TransformerOptions()).double().eval()
    (x,) = torch.randn(1, 3, dtype=torch.float64)
    gates_and_values = [
        sum(a * b for a, b in zip(row, x.tolist(), strict=True)) + bias
        for row, bias in zip(block.expand.weight.tolist(), block.expand.bias.tolist(), strict=True)
    ]
    gates, values = gates_and_values[:2], gates_and_values[2:]
    inner = [g / (1 + 2.718281828459045**-g) * v for g, v in zip(gates, values, strict=True)]
    expected = block.contract.weight @ torch.tensor(inner, dtype=torch.float64) + block.contract.bias
    torch.testing.assert_close(block(x[None, None])[0, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_root_of_the_mean_square_is_one_in_any_type(dtype: torch.dtype) -> None:
    norm = make_norm(8, replace(SMALL, **RMS)).to(dtype)
    y = norm(
        torch.full((1, 8), 0.01, dtype=dtype)
    ).double()  # small: what is added below the root must be smaller
    assert y.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_fast_form_finds_what_the_model_does(changes: dict[str, Any]) -> None:
    model = variant(changes)
    form, remark = search_form(model)
    assert isinstance(form, InferenceTransformer) and remark is None
    for found, expected in zip(search(form, SENTENCES, 4), search(model, SENTENCES, 4), strict=True):
        assert [x.tokens for x in found] == [x.tokens for x in expected]
        assert [x.score for x in found] == pytest.approx([x.score for x in expected], abs=1e-10)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_its_scores_are_those_of_the_model_in_other_types(
    changes: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    """Numbers in the weights stay small, so that rounding does; warnings of slow forms are errors."""
    model = variant(changes, torch.float32, scale=1.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    form, remark = search_form(model, dtype)
    assert isinstance(form, InferenceTransformer) and remark is None and form.dtype == dtype
    target = torch.randint(4, VOCABULARY_SIZE, (6, 5))
    with torch.inference_mode():
        expected = model.decode(target, model.encode(padded(SENTENCES)))
        memory, state = form.encode(padded(SENTENCES)), form.start_state()
        steps = [form.project(form.step(x, memory, state)) for x in target.unbind(dim=1)]
    found = torch.stack(steps, dim=1).float() + form.logit_offset
    torch.testing.assert_close(found.log_softmax(2), expected.log_softmax(2), atol=tolerance, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("changes", "name"), [(GATED, "GatedFeedForward"), (RMS, "RMSNorm")])
def test_who_does_not_know_a_part_says_so_by_its_name(changes: dict[str, Any], name: str) -> None:
    model = variant(changes, torch.float32)
    with pytest.raises(UserError, match=f"fp32 or bf16 with .* of the class {name} and not .* but is int8"):
        search_form(model, torch.int8)
    assert name in (why_padded(model) or "")
    assert static_search([search_form(model).model]) is None
    assert name in (find_stranger(model, within_encoder=True) or "")  # what the exporter asks


class HalfResidual(nn.Module):
    """Adds half of what a block makes, as a variant of `Residual` may."""

    def __init__(self, plain: Residual) -> None:
        super().__init__()
        self.norm, self.dropout = plain.norm, plain.dropout

    def forward(self, x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        return self.norm(x + self.dropout(block(x)) / 2)


def test_another_connection_around_blocks_is_fast_where_it_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = variant({}), variant({})
    for layer in (*model.encoder.layers, *model.decoder.layers):
        for name, part in list(layer.named_children()):
            if isinstance(part, Residual):
                setattr(layer, name, HalfResidual(part))
    expected = search(model, SENTENCES, 4)
    assert expected != search(plain, SENTENCES, 4)
    form, remark = search_form(model)
    assert form is model and "HalfResidual" in (remark or "")
    assert known_parts._VARIANTS[Residual] is RESIDUALS
    monkeypatch.setitem(known_parts._VARIANTS, Residual, (*RESIDUALS, HalfResidual))
    form, remark = search_form(model)
    assert isinstance(form, InferenceTransformer) and remark is None
    for found, own in zip(search(form, SENTENCES, 4), expected, strict=True):
        assert [x.tokens for x in found] == [x.tokens for x in own]
        assert [x.score for x in found] == pytest.approx([x.score for x in own], abs=1e-10)
    with pytest.raises(UserError, match=r"HalfResidual and not .* but is int8"):
        search_form(model, torch.int8)
    assert "HalfResidual" in (why_padded(model) or "")
    assert static_search([form]) is None


def test_layers_are_left_out_as_often_as_is_said_and_in_training_alone() -> None:
    torch.manual_seed(1)
    layers = variant({"encoder_layers": 10, "decoder_layers": 1}).encoder.layers
    passes = [[number for number, _ in left_in(layers, 0.25)] for _ in range(400)]
    counts = [sum(number in kept for kept in passes) for number in range(10)]
    assert all(abs(count - 300) < 4 * 75**0.5 for count in counts)  # four standard deviations
    assert [number for number, _ in left_in(layers, 0.0)] == list(range(10))
    model = variant({"decoder_layerdrop": 0.9, "encoder_layerdrop": 0.9})
    source, target = padded(SENTENCES), torch.tensor([[2, 5]] * 3)
    assert torch.equal(model(source, target), variant({})(source, target))
    model.train()
    assert not torch.equal(model(source, target), variant({})(source, target))
    assert "LayerDrop" in (why_padded(model) or "")


class VariantTask(PairTask):
    def __init__(self, **changes: Any) -> None:
        self.options = replace(SMALL, **changes)

    def build_model(self) -> Transformer:
        return variant_of(self.options)


def variant_of(options: TransformerOptions) -> Transformer:
    torch.manual_seed(3)
    return options.build(source_vocabulary_size=15, target_vocabulary_size=15, pad_id=PAD_ID)


def trained(
    changes: dict[str, Any], num_updates: int, **options: Any
) -> tuple[list[float], dict[str, Tensor]]:
    task = VariantTask(**changes)
    optimization = OptimizationOptions(lr=0.01, warmup_updates=1, **options)
    trainer = Trainer(task, task.build_model(), optimization, world=CPU, seed=1, updates_per_epoch=1)
    losses = []
    for number in range(num_updates):
        with trainer.metrics.scope(str(number)):
            trainer.train_step([MicroBatch(collate([0, 1, 2]), 1.0, [0, 1, 2])])
        losses.append(trainer.metrics.sums(str(number), CPU)["loss"])
    return losses, dict(trainer.model.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [VARIANTS["all"], VARIANTS["all"] | {"activation_checkpointing": True}])
def test_all_together_learn_and_draw_the_same_again(changes: dict[str, Any], precision: str) -> None:
    losses, weights = trained(changes, 30, precision=precision)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    again, weights_again = trained(changes, 30, precision=precision)
    assert losses == again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def save_weights(world: World, folder: str) -> None:
    task = VariantTask(encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    options = OptimizationOptions(lr=0.01, warmup_updates=1)
    trainer = Trainer(task, task.build_model(), options, world=world, seed=1, updates_per_epoch=1)
    shares = [[0, 1, 2], [3, 4]] if world.is_main else [[5, 6], [7, 8, 9]]
    for _ in range(10):
        trainer.train_step([MicroBatch(collate(indices), 1.0, indices) for indices in shares])
    trainer.close()
    torch.save(trainer.model.state_dict(), f"{folder}/{world.rank}.pt")


@pytest.mark.slow
def test_ranks_that_leave_out_different_layers_stay_alike(tmp_path: Path) -> None:
    run_ranks(save_weights, str(tmp_path), size=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = VariantTask().build_model().state_dict()
    assert all(not torch.equal(first[name], start[name]) for name in first)  # no layer was left out for good
