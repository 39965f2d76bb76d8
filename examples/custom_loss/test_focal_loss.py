"""The example's loss against plain loops, and its task through the real commands."""

import json
import math
import random
import tomllib
from pathlib import Path

import pytest
import torch
from focal_loss import focal_loss

from nmt.cli.generate import main as generate
from nmt.cli.preprocess import main as preprocess
from nmt.cli.train import main as train
from nmt.data.parallel_dataset import collate_pairs
from nmt.data.vocabulary import PAD_ID
from nmt.models.options import TransformerOptions
from nmt.models.transformer import Transformer
from nmt.translation.loss import translation_loss

FOLDER = Path(__file__).parent
SIZES = {f"{side}_{size}": 16 for side in ("encoder", "decoder") for size in ("embed_dim", "ffn_embed_dim")}
SIZES |= {f"{side}_layers": 1 for side in ("encoder", "decoder")}
SIZES |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the entry points of the example known, as installing it does."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "site" / "focal_loss_example-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    tasks = "".join(f"{name} = {value}\n" for name, value in project["entry-points"]["nmt.tasks"].items())
    (metadata / "entry_points.txt").write_text(f"[nmt.tasks]\n{tasks}")
    monkeypatch.syspath_prepend(metadata.parent)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_loss_is_the_formula_token_by_token(gamma: float) -> None:
    torch.manual_seed(1)
    options = TransformerOptions(**SIZES, dropout=0.0)
    model = Transformer(options, source_vocabulary_size=12, target_vocabulary_size=9, pad_id=PAD_ID)
    rng = random.Random(1)
    sides = [[torch.tensor([*rng.choices(range(4, 9), k=n), 2]).numpy() for n in (3, 1, 5)] for _ in range(2)]
    batch = collate_pairs(list(zip(*sides, strict=True)))
    output = focal_loss(model, batch, gamma=gamma)
    logits = model.decode(batch.target_input, model.encode(batch.source))
    loss = nll = 0.0
    for row, targets in zip(logits.tolist(), batch.target.tolist(), strict=True):
        for scores, token in zip(row, targets, strict=True):
            if token != PAD_ID:
                p = math.exp(scores[token]) / sum(map(math.exp, scores))
                loss -= (1 - p) ** gamma * math.log(p)
                nll -= math.log(p)
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)
    assert output.sums["nll"].item() == pytest.approx(nll, rel=1e-5)
    if gamma == 0.0:
        plain = translation_loss(model, batch, label_smoothing=0.0)
        torch.testing.assert_close(output.loss, plain.loss)


@pytest.mark.usefixtures("installed")
def test_the_task_trains_and_its_model_translates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    rng = random.Random(1)
    for split, num_lines in (("train", 1000), ("valid", 20)):
        lines = "".join(
            " ".join(rng.choices("0123456789", k=rng.randint(1, 4))) + "\n" for _ in range(num_lines)
        )
        for language in ("xx", "yy"):
            (text / f"{split}.{language}").write_text(lines)
    data, run = str(tmp_path / "data"), tmp_path / "run"
    files = ["--trainpref", f"{text}/train", "--validpref", f"{text}/valid", "--destdir", data]
    preprocess(
        ["--source-lang", "xx", "--target-lang", "yy", *files, "--vocab-size", "290", "--workers", "1"]
    )
    sizes = [text for name, size in SIZES.items() for text in (f"--{name.replace('_', '-')}", str(size))]
    limits = ["--max-tokens", "500", "--max-update", "40", "--log-interval", "20", "--warmup-updates", "10"]
    options = [
        "--task",
        "focal_translation",
        "--save-dir",
        str(run),
        "--lr",
        "5e-3",
        "--device",
        "cpu",
        *limits,
    ]
    train([data, *options, *sizes, "--focal-gamma", "1.5", "--no-eval-bleu"])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    nlls = [record["nll"] for record in records if record["kind"] == "train"]
    assert losses[1] < losses[0]
    assert all(loss < nll for loss, nll in zip(losses, nlls, strict=True))  # each token weighs less than 1
    assert "focal-gamma: 1.5" in (run / "config.yaml").read_text()
    assert "label-smoothing: 0.0" in (run / "config.yaml").read_text()
    (tmp_path / "input").write_text("1 2\n3\n")
    capsys.readouterr()
    generate(
        ["--model", str(run / "checkpoints" / "best"), "--input", str(tmp_path / "input"), "--device", "cpu"]
    )
    assert capsys.readouterr().out.count("\n") == 2
    with pytest.raises(SystemExit):
        train([data, *options, "--label-smoothing", "0.1"])
    assert "`label-smoothing` must be 0 with a loss of the task's own" in capsys.readouterr().err


def test_it_is_as_short_as_the_readme_says() -> None:
    num_lines = len((FOLDER / "focal_loss.py").read_text().splitlines())
    assert num_lines < 40 and f"in {num_lines} lines" in (FOLDER / "README.md").read_text()
