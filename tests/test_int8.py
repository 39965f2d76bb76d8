"""Products of 8-bit integers against exact arithmetic."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.id_search import padded
from support.int8_processor import needs_vnni
from support.random_transformer import TWO_LAYERS, random_transformer
from torch import Tensor, nn

from nmt.data.vocabulary import PAD_ID
from nmt.errors import UserError
from nmt.models import inference_int8 as int8
from nmt.models.blocks import Embedding, FeedForward
from nmt.models.inference import InferenceTransformer
from nmt.models.inference_int8 import check_int8, int8_feed_forward, int8_map, ranges
from nmt.models.options import TransformerOptions
from nmt.models.transformer import Transformer

STEP = 2**-5
RANGE = 127 * STEP


def integer_weights(num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """Return integers (O, D) from -127 to 127, the largest of each row 127, and a scale (O, 1) for each row."""
    integers = torch.randint(-127, 128, (num_outputs, num_inputs))
    integers[:, 0] = 127
    return integers, 2.0 ** torch.randint(-9, -5, (num_outputs, 1))


@needs_vnni
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_rows=st.integers(1, 40),
    num_inputs=st.integers(1, 300),
    num_outputs=st.integers(1, 90),
    has_bias=st.booleans(),
)
def test_sums_of_rounded_numbers_are_exact(
    seed: int, num_rows: int, num_inputs: int, num_outputs: int, has_bias: bool
) -> None:
    torch.manual_seed(seed)
    integers, scales = integer_weights(num_outputs, num_inputs)
    bias = torch.randn(num_outputs) if has_bias else None
    steps = torch.randint(-127, 128, (num_rows, num_inputs))
    # Between half a step below and above; at the edge of the range only what is within it.
    x = ((steps + 0.9 * (torch.rand(steps.shape) - 0.5)) * STEP).clamp(-RANGE, RANGE)
    # Places that are as many times as wide as their weights are smaller change nothing.
    widths = 2.0 ** torch.randint(-3, 4, (num_inputs,))
    found = int8_map(integers * scales / widths, bias, RANGE * widths)(x * widths)
    expected = (steps.double() @ integers.double().T) * STEP * scales.double().T
    if bias is not None:
        expected += bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


@needs_vnni
def test_what_is_beyond_the_range_is_cut_off() -> None:
    multiply = int8_map(torch.eye(4), None, torch.full((4,), RANGE))
    x = torch.tensor([[1.0, 5.0, -5.0, 1e9], [-1e9, torch.inf, -torch.inf, -RANGE]])
    expected = torch.tensor([[1.0, RANGE, -RANGE, RANGE], [-RANGE, RANGE, -RANGE, -RANGE]])
    torch.testing.assert_close(multiply(x), expected)


@needs_vnni
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), num_rows=st.integers(2, 300), dim=st.sampled_from([16, 64, 100]))
def test_a_row_is_the_same_whatever_its_neighbours(seed: int, num_rows: int, dim: int) -> None:
    torch.manual_seed(seed)
    feed_forward, norm = random_feed_forward(dim, 3 * dim)
    x = norm(torch.randn(num_rows, dim)).detach()
    place = int(torch.randint(num_rows, ()))
    for compute in (
        int8_map(torch.randn(50, dim), torch.randn(50), ranges(norm)),
        int8_feed_forward(feed_forward, norm),
    ):
        assert torch.equal(compute(x)[place], compute(x[place : place + 1])[0])


@needs_vnni
def test_an_output_without_weights_is_its_bias() -> None:
    found = int8_map(torch.zeros(3, 8), torch.tensor([1.0, -2.0, 0.0]), torch.ones(8))(torch.randn(2, 8))
    assert found.tolist() == [[1.0, -2.0, 0.0]] * 2


def random_feed_forward(dim: int, ffn_dim: int) -> tuple[FeedForward, nn.LayerNorm]:
    feed_forward = FeedForward(dim, ffn_dim, options=TransformerOptions()).eval()
    norm = nn.LayerNorm(dim)
    with torch.no_grad():
        for parameter in (*feed_forward.parameters(), *norm.parameters()):
            parameter.copy_(torch.randn_like(parameter) * (dim**-0.5 if parameter.dim() > 1 else 0.5))
        norm.weight += 1.0
    return feed_forward, norm


@needs_vnni
def test_a_feed_forward_block_is_the_float_one_but_for_its_roundings() -> None:
    torch.manual_seed(0)
    feed_forward, norm = random_feed_forward(64, 256)
    x = norm(torch.randn(500, 64)).detach()
    with torch.no_grad():
        expected = feed_forward(x)
        found = int8_feed_forward(feed_forward, norm)(x)
        # By hand: what each rounding adds, uniform over a step, whose variance is step**2 / 12.
        hidden = F.relu(feed_forward.expand(x))
        steps = ranges(norm) / 127
        weight, second = feed_forward.expand.weight, feed_forward.contract.weight
        from_inputs = ((weight * steps).square() / 12).sum(dim=1)
        in_steps = x / steps
        from_weights = (
            ((weight * steps).abs().amax(dim=1) / 127) ** 2 / 12 * in_steps.square().sum(dim=1).mean()
        )
        mean, deviation = weight @ norm.bias + feed_forward.expand.bias, (weight * norm.weight).norm(dim=1)
        widths = (mean + 8 * deviation).clamp(min=1e-6)
        from_hidden = (widths / 255) ** 2 / 12
        # Half of the hidden numbers are 0, and their errors with them.
        alive = (hidden > 0).float().mean(dim=0)
        variance = (second.square() * (alive * (from_inputs + from_weights + from_hidden))).sum(dim=1)
        scales = (second * widths).abs().amax(dim=1) / 127
        variance += scales**2 / 12 * (hidden / widths).square().sum(dim=1).mean()
    errors = (found - expected).square().mean(dim=0)
    assert 0.5 < float((errors / variance).mean()) < 1.5
    assert float(errors.mean()) < 0.03**2 * float(expected.var())


@needs_vnni
def test_hidden_numbers_beyond_their_range_are_cut_off() -> None:
    feed_forward = FeedForward(4, 1, options=TransformerOptions()).eval()
    norm = nn.LayerNorm(4)
    with torch.no_grad():
        feed_forward.expand.weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0]]))
        feed_forward.contract.weight.fill_(1.0)
        feed_forward.expand.bias.fill_(0.0)
        feed_forward.contract.bias.fill_(0.0)
    compute = int8_feed_forward(feed_forward, norm)
    # The deviation of the sum of four independent numbers is 2, so the range is 16; that of each number is 6.
    found = compute(torch.tensor([[3.0, 3.0, 3.0, 3.0], [6.0, 6.0, 6.0, 6.0], [-1.0, -1.0, -1.0, -1.0]]))
    expected = torch.tensor([[12.0], [16.0], [0.0]]).expand(3, 4)
    torch.testing.assert_close(found, expected, atol=0.15, rtol=0)
    with torch.no_grad():
        feed_forward.expand.bias.fill_(-20.0)  # so that it is always below 0
    assert int8_feed_forward(feed_forward, norm)(torch.ones(1, 4)).tolist() == [[0.0] * 4]


def test_ranges() -> None:
    norm = nn.LayerNorm(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0]))
        norm.bias.copy_(torch.tensor([4.0, -1.0]))
    assert ranges(norm).tolist() == [10.0, 13.0]  # 6 * 1 + 4, 6 * 2 + 1
    sizes = {"vocabulary_size": 3, "dim": 4, "pad_id": 0, "max_positions": 5}
    embedding = Embedding(**sizes, learned_positions=True, options=TransformerOptions())  # type: ignore[arg-type]
    with torch.no_grad():
        embedding.tokens.weight.fill_(0.25)
        embedding.tokens.weight[1, 2] = -0.5
        embedding.positions.fill_(0.0)
        embedding.positions[3, 1] = -0.75
    assert ranges(embedding).tolist() == [0.5, 1.25, 1.0, 0.5]  # sqrt(4) * 0.25, that + 0.75, sqrt(4) * 0.5
    normed = Embedding(
        **sizes,  # type: ignore[arg-type]
        learned_positions=True,
        options=TransformerOptions(layernorm_embedding=True),
    )
    assert ranges(normed).tolist() == [6.0] * 4
    normed.norm = nn.RMSNorm(4)
    for unknown in (nn.RMSNorm(4), normed):
        with pytest.raises(UserError, match=r"`precision` int8 must know .* but not a RMSNorm\. Take fp32"):
            ranges(unknown)  # type: ignore[arg-type]
    nn.init.zeros_(norm.weight), nn.init.zeros_(norm.bias)
    assert (ranges(norm) > 0).all()  # they divide


@needs_vnni
def test_the_products_of_a_layer_are_of_integers() -> None:
    """Else the tests of whole models would pass with floats too."""
    model = InferenceTransformer(random_transformer(2, torch.float32), torch.int8)
    with torch.inference_mode(), torch.profiler.profile(acc_events=True) as profile:
        memory, state = model.encode(padded([[5, 6], [7]])), model.start_state()
        model.project(model.step(torch.tensor([2, 2]), memory, state))
    counts = {event.key: event.count for event in profile.key_averages()}
    # Two layers: query-key-value, query, and two of the feed-forward block; and the output projection.
    assert counts["onednn::qlinear_pointwise"] == 2 * 4 + 1


def test_other_devices_and_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="must be used on a CPU, but the device is cuda:0"):
        check_int8(torch.device("cuda", 0))
    # As where sums are cut off: what comes out is too small.
    monkeypatch.setattr(int8, "int8_map", lambda *_: lambda x: x)
    int8.is_available.cache_clear()
    assert not int8.is_available()
    with pytest.raises(UserError, match="VNNI"):
        check_int8(torch.device("cpu"))
    int8.is_available.cache_clear()


@needs_vnni
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(number: float) -> None:
    """Integers have no such numbers: the translations would look like others."""
    model = random_transformer(0, torch.float32)
    with torch.no_grad():
        model.output_weight[3, 2] = number
    with pytest.raises(UserError, match="must have finite weights"):
        InferenceTransformer(model, torch.int8)


@needs_vnni
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("activation_fn", ["relu", "gelu"])
@pytest.mark.parametrize("layernorm_embedding", [False, True])
def test_each_product_has_the_range_of_what_it_is_given(
    pre_norm: bool, activation_fn: str, layernorm_embedding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    options = replace(
        TWO_LAYERS,
        encoder_layers=1,
        decoder_normalize_before=pre_norm,
        activation_fn=activation_fn,
        layernorm_embedding=layernorm_embedding,
    )
    sizes = {"source_vocabulary_size": 20, "target_vocabulary_size": 30, "pad_id": PAD_ID}
    model = Transformer(options, **sizes).eval()
    norms = [x for x in model.decoder.modules() if isinstance(x, nn.LayerNorm)]
    with torch.no_grad():
        for i, norm in enumerate(norms):
            norm.weight.fill_(4.0 ** (i + 2))  # each of another range
    shares = []
    quantized = int8._quantized

    def record(x: Tensor, steps_per_unit: Tensor) -> Tensor:
        shares.append(float((x * steps_per_unit).abs().max() / 127))
        return quantized(x, steps_per_unit)

    monkeypatch.setattr(int8, "_quantized", record)
    fast = InferenceTransformer(model, torch.int8)
    with torch.inference_mode():
        memory, state = fast.encode(padded([[5, 6, 7]] * 30)), fast.start_state()
        logits = fast.project(fast.step(torch.arange(30), memory, state))
    assert logits.dtype == torch.float32
    assert len(shares) == 2 * 3 + 1
    assert all(0.3 < share <= 1.0 for share in shares), shares
