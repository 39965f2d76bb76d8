"""A model that the fast form does not know is run as it is, and both forms are held against each other."""

import copy
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.id_search import padded, search
from support.int8_processor import needs_vnni
from support.random_transformer import VOCABULARY_SIZE, random_transformer
from support.table_model import TableModel, from_table
from support.tiny_translation_model import write_tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.distributed import World
from nmt.errors import UserError
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.models.attention import SelfAttention
from nmt.models.blocks import Embedding, FeedForward, Residual
from nmt.models.inference import InferenceTransformer
from nmt.models.search_form import SearchForm, relative_difference, search_form
from nmt.models.training_ops import Linear
from nmt.models.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer, Transformer
from nmt.task_extras import check_model
from nmt.translation.translator import Translator
from nmt.update.compilation import compile_layers, compile_model

SENTENCES = [[5, 6, 7, 8], [9, 4], [7]]
Layer = EncoderLayer | DecoderLayer


class GatedFeedForward(FeedForward):
    """What somebody else's model may have: another map by the same weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(self.contract(self.activation(self.expand(x))))


class OtherResidual(Residual):
    def forward(self, x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        return 0.5 * super().forward(x, block)


class OtherLinear(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


class OtherSelfAttention(SelfAttention):
    """It takes its weights by itself, and does not call their module."""

    def forward(self, x: Tensor, **arguments: object) -> Tensor:
        return (
            super().forward(x, **arguments) + nn.functional.linear(x, self.qkv_proj.weight)[..., : x.size(-1)]
        )


class OtherEmbedding(Embedding):
    def forward(self, token_ids: Tensor, start: int = 0, **arguments: object) -> Tensor:
        return super().forward(token_ids, start, **arguments).flip(-1)


class OtherNorm(nn.RMSNorm):
    pass


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls


def _around(layer: Layer) -> Residual:
    return layer.around_feed_forward


def _weight_norm(layer: Layer) -> None:
    torch.nn.utils.parametrizations.weight_norm(layer.feed_forward.expand)
    with torch.no_grad():
        layer.feed_forward.expand.parametrizations.weight.original0.mul_(1.5)


def _own_forward(layer: Layer) -> None:
    plain = layer.feed_forward.forward
    layer.feed_forward.forward = lambda x: plain(x) - x


def _without_bias(layer: Layer) -> None:
    linear = layer.self_attention.out_proj
    layer.self_attention.out_proj = nn.Linear(linear.in_features, linear.out_features, bias=False).double()


def _activate_by(layer: Layer, activation: nn.Module) -> None:
    del layer.feed_forward.activation  # a function, which a module may not take the place of
    layer.feed_forward.activation = activation


STRANGERS: dict[str, Callable[[Layer], object]] = {
    "gated feed-forward": lambda layer: _become(layer.feed_forward, GatedFeedForward),
    "other norm": lambda layer: setattr(
        _around(layer), "norm", OtherNorm(_around(layer).norm.normalized_shape, dtype=torch.float64)
    ),
    "norm without weights": lambda layer: setattr(
        _around(layer),
        "norm",
        nn.LayerNorm(_around(layer).norm.normalized_shape, elementwise_affine=False, eps=1.0),
    ),
    "no norm": lambda layer: setattr(_around(layer), "norm", nn.Identity()),
    "other residual": lambda layer: _become(_around(layer), OtherResidual),
    "other linear map": lambda layer: _become(layer.self_attention.out_proj, OtherLinear),
    "linear map without a bias": _without_bias,
    "other self-attention": lambda layer: _become(layer.self_attention, OtherSelfAttention),
    "other dropout": lambda layer: setattr(layer.feed_forward, "dropout", nn.Hardtanh()),
    "parametrised map": lambda layer: parametrize.register_parametrization(
        layer.feed_forward.contract, "weight", Doubled()
    ),
    "weight norm": _weight_norm,
    "hook": lambda layer: layer.feed_forward.expand.register_forward_hook(lambda _, __, y: 2.0 * y),
    "hook before": lambda layer: layer.self_attention.register_forward_pre_hook(lambda _, x: (0.5 * x[0],)),
    "own forward": _own_forward,
    "module for the activation": lambda layer: _activate_by(layer, nn.PReLU(init=-0.5, dtype=torch.float64)),
}


def changed(stack: str, change: Callable[[Layer], object]) -> Transformer:
    model = random_transformer(3, torch.float64)
    layer = getattr(model, stack).layers[-1]
    change(layer)
    return model


def assert_same_search(form: InferenceTransformer | Transformer, model: Transformer) -> None:
    found, expected = (search(x, SENTENCES, 3) for x in (form, model))
    assert [[x.tokens for x in nbest] for nbest in found] == [[x.tokens for x in nbest] for nbest in expected]
    for nbest, nbest_expected in zip(found, expected, strict=True):
        assert [x.score for x in nbest] == pytest.approx([x.score for x in nbest_expected], abs=1e-9)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("change", STRANGERS.values(), ids=STRANGERS)
def test_strangers_are_run_as_they_are(stack: str, change: Callable[[Layer], object]) -> None:
    plain, model = random_transformer(3, torch.float64), changed(stack, change)
    with torch.inference_mode():
        sources, target = padded(SENTENCES), torch.tensor([[EOS_ID, 5, 6]] * 3)
        difference = model.decode(target, model.encode(sources)) - plain.decode(target, plain.encode(sources))
    assert difference.abs().max() > 1e-3  # so that the test tells something
    before = copy.deepcopy(model.state_dict())
    form, remark = search_form(model)
    assert_same_search(form, model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    if stack == "encoder":
        assert isinstance(form, InferenceTransformer) and remark is None
    else:
        assert form is model
        assert remark is not None and "`decoder.layers.1." in remark and "as it is" in remark


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("decoder.embedding", OtherEmbedding),
        ("decoder", type("OtherDecoder", (Decoder,), {})),
        ("encoder", type("OtherEncoder", (Encoder,), {})),
        (
            "",
            type(
                "OtherTransformer",
                (Transformer,),
                {"project": lambda self, x: 2 * Transformer.project(self, x)},
            ),
        ),
    ],
)
def test_strangers_outside_of_layers_are_run_as_they_are(name: str, cls: type[nn.Module]) -> None:
    model = random_transformer(3, torch.float64)
    _become(model.get_submodule(name), cls)
    form, remark = search_form(model)
    assert form is model
    assert remark is not None and f"of the class {cls.__name__} and not" in remark
    assert_same_search(form, model)


def test_heads_of_other_sizes_in_one_layer_show_in_a_small_batch() -> None:
    model = random_transformer(3, torch.float64)
    model.decoder.layers[1].self_attention.num_heads = 2
    form, remark = search_form(model)
    assert form is model
    assert remark is not None and "computes something else" in remark


def test_an_embedding_of_the_encoder_may_be_a_stranger() -> None:
    model = random_transformer(3, torch.float64)
    _become(model.encoder.embedding, OtherEmbedding)
    form, remark = search_form(model)
    assert isinstance(form, InferenceTransformer) and remark is None
    assert_same_search(form, model)


def test_a_method_of_one_model_alone_makes_it_a_stranger() -> None:
    model = random_transformer(3, torch.float64)
    model.project = lambda x: 2 * Transformer.project(model, x)
    form, remark = search_form(model)
    assert form is model
    assert remark is not None and "`the model` (Transformer), which has a `project` of its own" in remark


@pytest.mark.parametrize(
    "compile_", [lambda model: compile_model(model, has_one_shape=False), compile_layers]
)
def test_what_torch_compiles_is_no_stranger(compile_: Callable[[nn.Module], None]) -> None:
    model = random_transformer(3, torch.float64)
    with mock.patch("nmt.update.compilation._compiled", lambda function, **_: function):
        compile_(model)
    assert any("forward" in vars(module) for module in model.modules())
    form, remark = search_form(model)
    assert isinstance(form, InferenceTransformer) and remark is None
    assert_same_search(form, model)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, pytest.param(torch.int8, marks=needs_vnni)])
def test_what_nobody_can_see_shows_in_a_small_batch(dtype: torch.dtype | None) -> None:
    """A class that is changed itself, for the decoder's layers or the encoder's output."""
    model = random_transformer(3, torch.float32)
    assert search_form(model, dtype).remark is None
    with mock.patch.object(DecoderLayer, "forward", _halved(DecoderLayer.forward)):
        form, remark = search_form(model, dtype)
    assert form is model
    assert remark is not None and "computes something else than the model" in remark
    assert ("in float32" in remark) == (dtype is not None)
    with mock.patch.object(
        Transformer, "project", lambda self, x: 1.1 * nn.functional.linear(x, self.output_weight)
    ):
        assert search_form(model, dtype).model is model


def _halved(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **options: 0.5 * forward(*arguments, **options)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), packs=st.booleans())
def test_rounding_is_far_below_the_tolerance(seed: int, packs: bool) -> None:
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        model = random_transformer(seed, dtype)
        assert relative_difference(InferenceTransformer(model, packs=packs), model) < limit
        assert search_form(model).remark is None
    assert search_form(random_transformer(seed, torch.float32), torch.bfloat16).remark is None
    assert search_form(random_transformer(seed, torch.float32).bfloat16()).remark is None


def test_a_model_that_is_not_a_number_is_not_said_to_differ() -> None:
    model = random_transformer(3, torch.float32)
    with torch.no_grad():
        model.output_weight.fill_(torch.nan)
    assert search_form(model).remark is None


def test_checking_draws_no_random_numbers_and_leaves_autocast_alone() -> None:
    model = random_transformer(3, torch.float32)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert search_form(model).remark is None
    assert torch.equal(torch.get_rng_state(), state)


TOKENS = st.integers(UNK_ID, VOCABULARY_SIZE - 1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    beam=st.sampled_from([1, 2, 3, 20]),
    num_steps=st.integers(1, 8),
    first_alike=st.booleans(),
    is_whole=st.booleans(),
    data=st.data(),
)
def test_the_fast_form_takes_any_tokens_step_by_step_as_the_model_takes_them_at_once(
    seed: int, beam: int, num_steps: int, first_alike: bool, is_whole: bool, data: st.DataObject
) -> None:
    """The hypotheses of a sentence may differ from the first token on."""
    model = random_transformer(seed, torch.float64)
    form = InferenceTransformer(model)
    sources = padded(SENTENCES[:2])
    size = 2 * beam * num_steps
    drawn = data.draw(st.lists(TOKENS, min_size=size, max_size=size))
    tokens = torch.tensor(drawn).view(2 * beam, -1)
    if first_alike:
        tokens[:, 0] = EOS_ID
    with (
        torch.inference_mode(),
        mock.patch("nmt.models.inference_state.multiplied_by_onednn", return_value=is_whole),
    ):
        expected = model.features(tokens, model.encode(sources))
        memory, state = form.encode(sources), form.start_state()
        found = torch.stack([form.step(x, memory, state) for x in tokens.unbind(dim=1)], dim=1)
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def folder(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("run") / "model")


LINES = ["the old dog", "a cat sees the red bird"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("int8", marks=needs_vnni)])
def test_a_translator_says_why_it_takes_the_model_as_it_is(
    folder: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Translator.load(folder)
    assert plain.remarks == [] and capsys.readouterr().err == ""
    (model,) = plain.models
    _become(model.decoder.layers[0].feed_forward, GatedFeedForward)
    translator = Translator([model], plain.task, device="cpu", precision=precision)
    assert translator.fast_models == [model]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: `decoder.layers.0.feed_forward`, which is of the class GatedFeedForward")
    options = DecodingOptions(beam=3)
    generator = Generator([model], options, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID)
    expected = generator.generate(padded([x.tolist() for x in translator.source_segmenter.encode(LINES)]))
    found = list(translator.translate_lines(LINES, options))
    assert [x.hypotheses[0].tokens for x in found] == [x[0].tokens for x in expected]


def test_a_model_that_cannot_search_is_told_what_it_lacks() -> None:
    class Unfinished(nn.Module):
        max_target_positions, logit_offset, dtype = 9, 0.0, torch.float32

        def encode(self, source: Tensor) -> None: ...

    with pytest.raises(
        UserError, match="must have `start_state`, `step`, `project` to translate, but a Unfin"
    ):
        search_form(Unfinished())


def test_a_class_may_have_a_form_of_its_own() -> None:
    class Own(TableModel):
        pass

    form = InferenceTransformer(random_transformer(3, torch.float64))
    search_form.register(Own, lambda model, dtype=None: SearchForm(form, None))
    probabilities = from_table({})
    assert search_form(Own(probabilities)).model is form
    other = TableModel(probabilities)
    assert search_form(other) == SearchForm(other, None)


def test_a_search_in_place_is_for_models_that_are_known(folder: Path) -> None:
    plain = Translator.load(folder, in_place=True)
    assert plain.static_search is not None
    (model,) = plain.models
    _become(model.decoder.layers[0].feed_forward, GatedFeedForward)
    assert Translator([model], plain.task, device="cpu", in_place=True).static_search is None


def test_a_run_says_so_before_its_first_update_and_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Translator.load(folder).task
    model = task.build_model()
    world = World(rank=0, size=1, device=torch.device("cpu"))
    check_model(task, model, world)
    assert capsys.readouterr().err == ""
    _become(model.decoder.layers[0].feed_forward, GatedFeedForward)
    model.train()
    for _ in range(2):
        check_model(task, model, world)
    assert model.training
    (line,) = capsys.readouterr().err.splitlines()
    assert "GatedFeedForward" in line


def test_other_ranks_say_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = Translator.load(folder).task
    model = task.build_model()
    _become(model.decoder.layers[0].feed_forward, GatedFeedForward)
    check_model(task, model, World(rank=1, size=2, device=torch.device("cpu")))
    assert capsys.readouterr().err == ""
