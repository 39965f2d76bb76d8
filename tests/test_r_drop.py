"""R-Drop and word dropout against slow references, and through training."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import nmt
from nmt.cli.preprocess import main as preprocess
from nmt.data.parallel_dataset import TranslationBatch, collate_pairs
from nmt.data.vocabulary import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from nmt.errors import UserError
from nmt.models.options import TransformerOptions
from nmt.models.transformer import Transformer
from nmt.translation import r_drop
from nmt.translation.loss import translation_loss
from nmt.translation.r_drop import r_drop_loss
from nmt.translation.word_dropout import drop_words

VOCABULARY = 11
SIZES = TransformerOptions(
    encoder_layers=1,
    decoder_layers=1,
    encoder_embed_dim=8,
    decoder_embed_dim=8,
    encoder_ffn_embed_dim=8,
    decoder_ffn_embed_dim=8,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    share_all_embeddings=True,
    dropout=0.3,
)


def make_model(dtype: torch.dtype = torch.float64) -> Transformer:
    torch.manual_seed(3)
    sizes = {"source_vocabulary_size": VOCABULARY, "target_vocabulary_size": VOCABULARY}
    return Transformer(SIZES, **sizes, pad_id=PAD_ID).to(dtype)


def make_batch(lengths: list[tuple[int, int]], seed: int = 1, low: int = UNK_ID) -> TranslationBatch:
    rng = np.random.default_rng(seed)

    def sentence(length: int) -> np.ndarray:
        return np.append(rng.integers(low, VOCABULARY, length), EOS_ID)

    return collate_pairs([(sentence(source), sentence(target)) for source, target in lengths])


def by_loops(
    p: list[float], q: list[float], target: int, eps: float, alpha: float
) -> tuple[float, float, float]:
    """Return loss, mean negative log-likelihood and divergence of one token, from two distributions."""
    wanted = [1 - eps if v == target else eps / (len(p) - 1) for v in range(len(p))]
    entropies = [-sum(w * math.log(x) for w, x in zip(wanted, each, strict=True)) for each in (p, q)]
    kl_pq = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    kl_qp = sum(y * math.log(y / x) for x, y in zip(p, q, strict=True))
    kl = (kl_pq + kl_qp) / 2
    return sum(entropies) + alpha * kl, -(math.log(p[target]) + math.log(q[target])) / 2, kl


def in_one_piece(
    model: Transformer, batch: TranslationBatch, eps: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """Return the loss by plain operations on all logits, and the distributions (2, B, T, V) of the two passes."""
    logits = [model.decode(batch.target_input, model.encode(batch.source)) for _ in range(2)]
    log_p, log_q = (x.log_softmax(-1) for x in logits)  # (B, T, V)
    wanted = torch.full_like(log_p, eps / (VOCABULARY - 1)).scatter_(2, batch.target[..., None], 1 - eps)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) + (log_q.exp() * (log_q - log_p)).sum(-1)
    losses = -(wanted * (log_p + log_q)).sum(-1) + alpha * kl / 2  # (B, T)
    return losses[batch.target != PAD_ID].sum(), torch.stack([log_p, log_q]).exp()


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=4),
    eps=st.sampled_from([0.0, 0.1, 0.5]),
    alpha=st.sampled_from([0.5, 5.0]),
    at_once=st.sampled_from([1, 40, 10_000]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradient_are_those_of_the_formula(
    lengths: list[tuple[int, int]], eps: float, alpha: float, at_once: int, seed: int
) -> None:
    model, batch = make_model(), make_batch(lengths, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(r_drop._LOGITS_AT_ONCE, "cpu", at_once)
        torch.manual_seed(seed)
        output = r_drop_loss(model, batch, label_smoothing=eps, alpha=alpha)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
    torch.manual_seed(seed)  # the same dropout in both passes as above
    loss, (p, q) = in_one_piece(model, batch, eps, alpha)
    expected = np.zeros(3)
    for i, targets in enumerate(batch.target.tolist()):
        for t, target in enumerate(targets):
            if target != PAD_ID:
                expected += by_loops(p[i, t].tolist(), q[i, t].tolist(), target, eps, alpha)
    found = [output.loss.item(), output.sums["nll"].item(), output.sums["kl"].item()]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert loss.item() == pytest.approx(expected[0], rel=1e-9)  # the slow form, from which the gradient comes
    for gradient, slow in zip(gradients, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, slow, rtol=1e-8, atol=1e-10)


def test_the_two_passes_differ_and_the_divergence_counts() -> None:
    model, batch = make_model(), make_batch([(3, 5), (5, 2)])
    torch.manual_seed(1)
    weak = r_drop_loss(model, batch, label_smoothing=0.1, alpha=1.0)
    torch.manual_seed(1)
    strong = r_drop_loss(model, batch, label_smoothing=0.1, alpha=4.0)
    assert weak.sums["kl"] > 0.001
    torch.testing.assert_close(strong.loss - weak.loss, 3 * weak.sums["kl"])


def test_in_evaluation_it_is_the_cross_entropy_of_one_pass() -> None:
    model, batch = make_model().eval(), make_batch([(3, 5), (5, 2)])
    output = r_drop_loss(model, batch, label_smoothing=0.1, alpha=5.0)
    plain = translation_loss(model, batch, label_smoothing=0.1)
    assert output.loss == plain.loss and output.sums == plain.sums


def test_in_bfloat16_the_sums_are_float32_and_close() -> None:
    """Each of the logits is rounded to 8 bits, about 2**-8 of it, which the sum over 140 tokens keeps below 2%."""
    batch = make_batch([(4, 6)] * 20)
    exact, rough = make_model(torch.float32), make_model(torch.bfloat16)
    for model in (exact, rough):
        model.load_state_dict({k: v.bfloat16().float() for k, v in exact.state_dict().items()})
    outputs = []
    for model in (exact, rough):
        torch.manual_seed(1)
        outputs.append(r_drop_loss(model, batch, label_smoothing=0.1, alpha=1.0))
    assert outputs[1].loss.dtype == torch.float32
    assert outputs[1].loss.item() == pytest.approx(outputs[0].loss.item(), rel=0.02)
    outputs[1].loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in rough.parameters())


def test_an_impossible_token_has_a_finite_loss() -> None:
    """In float32 exp(-1000) is 0; neither its logarithm nor 0 times infinity may be taken."""
    first, second = torch.tensor([[1000.0]], requires_grad=True), torch.tensor([[999.0]])
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    sums = r_drop._sums(first, second, weight, torch.tensor([1]), 0.1)
    assert torch.isfinite(sums).all() and sums[1] == 999.5
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(sums.sum(), [first, weight]))


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=5),
    probability=st.sampled_from([0.1, 0.5, 0.99]),
    seed=st.integers(0, 1000),
)
def test_only_words_are_dropped_and_targets_stay(
    lengths: list[tuple[int, int]], probability: float, seed: int
) -> None:
    batch = make_batch(lengths, seed)
    before = [tensor.clone() for tensor in (batch.source, batch.target_input, batch.target)]
    torch.manual_seed(seed)
    dropped = drop_words(batch, probability)
    for old, new in zip(before[:2], (dropped.source, dropped.target_input), strict=True):
        is_changed = old != new
        assert (new[is_changed] == UNK_ID).all()
        assert not torch.isin(old[is_changed], torch.tensor([BOS_ID, PAD_ID, EOS_ID])).any()
    assert torch.equal(dropped.target, before[2])
    assert (dropped.num_targets, dropped.num_examples) == (batch.num_targets, batch.num_examples)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (batch.source, batch.target_input, batch.target), strict=True)
    ), "the batch itself stays as it was"
    torch.manual_seed(seed)
    again = drop_words(batch, probability)
    assert torch.equal(again.source, dropped.source) and torch.equal(again.target_input, dropped.target_input)


@pytest.mark.parametrize("probability", [0.1, 0.6])
def test_a_share_of_the_words_is_dropped_each_on_its_own(probability: float) -> None:
    torch.manual_seed(0)
    batch = make_batch([(99, 99)] * 100, low=UNK_ID + 1)
    dropped = drop_words(batch, probability)
    words = (
        (batch.source[:, :-1], dropped.source[:, :-1]),
        (batch.target_input[:, 1:], dropped.target_input[:, 1:]),
    )
    for old, new in words:
        is_dropped = (old != new).double()
        # Five standard deviations of a binomial share; the same of neighbours that are dropped together.
        assert is_dropped.mean().item() == pytest.approx(
            probability, abs=5 * (0.25 / is_dropped.numel()) ** 0.5
        )
        both = (is_dropped[:, 1:] * is_dropped[:, :-1]).mean().item()
        assert both == pytest.approx(probability**2, abs=5 * (0.5 / is_dropped.numel()) ** 0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    for split, lines in (("train", 1500), ("valid", 20)):
        text = "".join(f"{i % 7} {i % 10} {i % 9}\n" for i in range(lines))
        for language in ("xx", "yy"):
            (folder / f"{split}.{language}").write_text(text)
    files = [
        "--trainpref",
        f"{folder}/train",
        "--validpref",
        f"{folder}/valid",
        "--destdir",
        f"{folder}/data",
    ]
    preprocess(
        ["--source-lang", "xx", "--target-lang", "yy", *files, "--vocab-size", "290", "--workers", "1"]
    )
    return folder / "data"


def train(data: Path, folder: Path, **options: Any) -> nmt.TrainingResult:
    sizes = {
        f"{side}_{size}": 16 for side in ("encoder", "decoder") for size in ("embed_dim", "ffn_embed_dim")
    }
    sizes |= {f"{side}_layers": 1 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    steps = {"max_tokens": 500, "lr": 5e-3, "warmup_updates": 5, "log_interval": 5}
    settings = {"eval_bleu": False, "device": "cpu", **sizes, **steps, **options}
    return nmt.train(nmt.train_config(data=data, save_dir=folder, **settings))


def test_a_run_with_both_goes_on_as_if_it_never_was_stopped(data: Path, tmp_path: Path) -> None:
    noise = {"r_drop": 1.0, "word_dropout": 0.1, "dropout": 0.1}
    whole = train(data, tmp_path / "whole", max_update=20, **noise)
    train(data, tmp_path / "parts", max_update=7, **noise)
    parts = train(data, tmp_path / "parts", max_update=20, **noise)
    one, other = (load_file(result.best.parent / "last" / "model.safetensors") for result in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    reports = [record for record in whole.history if record["kind"] == "train"]
    assert all(record["kl"] > 0 for record in reports) and reports[-1]["nll"] < reports[0]["nll"]
    assert all("kl" not in record for record in whole.history if record["kind"] == "valid")


def test_word_dropout_changes_training_and_not_validation(data: Path, tmp_path: Path) -> None:
    plain = train(data, tmp_path / "plain", max_update=1, log_interval=1, lr=1e-12, dropout=0.0)
    noisy = train(
        data, tmp_path / "noisy", max_update=1, log_interval=1, lr=1e-12, dropout=0.0, word_dropout=0.5
    )
    losses = [{r["kind"]: r["loss"] for r in result.history} for result in (plain, noisy)]
    assert losses[0]["train"] != losses[1]["train"]
    assert losses[0]["valid"] == pytest.approx(losses[1]["valid"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"r_drop": -1.0}, "`r-drop` must be finite and not negative"),
        ({"r_drop": 1.0, "dropout": 0.0}, "`r-drop` must have some dropout"),
        ({"word_dropout": 1.0}, "`word-dropout` must be at least 0 and below 1"),
    ],
)
def test_values_that_make_no_sense_are_refused(options: dict[str, float], text: str) -> None:
    with pytest.raises(UserError, match=text):
        nmt.train_config(data="DATA", save_dir="RUN", **options)
