"""The example's models through the real commands: trained, resumed, averaged, searched, aligned, and refused."""

import json
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_model_options import GruOptions, MeanOptions
from safetensors.torch import load_file
from torch import nn

from nmt import Request, Translator
from nmt.cli.average import main as average
from nmt.cli.convert import main as convert
from nmt.cli.generate import main as generate
from nmt.cli.preprocess import main as preprocess
from nmt.cli.score import main as score
from nmt.cli.train import main as train
from nmt.data.vocabulary import EOS_ID, PAD_ID
from nmt.models.protocols import AttendingModel

FOLDER = Path(__file__).parent
GRU, MEAN = GruOptions(hidden_size=16), MeanOptions(hidden_size=16)


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make the entry points of the example known, as installing it does."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    metadata = tmp_path_factory.mktemp("site") / "custom_model_example-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    tasks = "".join(f"{name} = {value}\n" for name, value in project["entry-points"]["nmt.tasks"].items())
    (metadata / "entry_points.txt").write_text(f"[nmt.tasks]\n{tasks}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(metadata.parent)
        yield


@pytest.fixture(scope="module")
def data(installed: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digits, of which each is translated by a letter, in the same order."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(1)
    for split, num_lines in (("train", 1000), ("valid", 20)):
        rows = [rng.choices(range(10), k=rng.randint(1, 4)) for _ in range(num_lines)]
        (folder / f"{split}.xx").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
        (folder / f"{split}.yy").write_text(
            "".join(" ".join("abcdefghij"[digit] for digit in row) + "\n" for row in rows)
        )
    files = ["--trainpref", f"{folder}/train", "--validpref", f"{folder}/valid", "--destdir", f"{folder}/bin"]
    preprocess(
        ["--source-lang", "xx", "--target-lang", "yy", *files, "--vocab-size", "290", "--workers", "1"]
    )
    return f"{folder}/bin"


def run(data: str, folder: Path, task: str, *more: str) -> Path:
    options = ["--task", task, "--save-dir", str(folder), "--lr", "1e-2", "--warmup-updates", "20"]
    limits = ["--max-tokens", "400", "--hidden-size", "32", "--log-interval", "20"]
    train([data, *options, *limits, "--device", "cpu", *more])
    return folder


@pytest.fixture(scope="module")
def trained(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gru") / "run"
    every = ["--save-interval-updates", "40", "--validate-interval-updates", "80", "--max-update", "160"]
    return run(data, folder, "gru_translation", *every, "--best-checkpoint-metric", "bleu")


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def errors(capsys: pytest.CaptureFixture[str], command: Any, arguments: list[str]) -> str:
    """Return the one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command(arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("options", [GRU, MEAN], ids=["gru", "mean"])
@torch.no_grad()
def test_step_by_step_the_model_computes_what_it_does_at_once(options: Any) -> None:
    torch.manual_seed(1)
    model: nn.Module = options.build(source_vocabulary_size=12, target_vocabulary_size=9, pad_id=PAD_ID)
    model.double().eval()
    source = torch.tensor([[5, 6, 7, EOS_ID], [8, EOS_ID, PAD_ID, PAD_ID]])
    target = torch.randint(4, 9, (4, 5))  # two hypotheses for each
    at_once = torch.stack([model(source, target[i::2]) for i in (0, 1)], dim=1).flatten(0, 1)
    memory, state = model.encode(source), model.start_state()
    steps = [model.step(tokens, memory, state) for tokens in target.unbind(dim=1)]
    torch.testing.assert_close(torch.stack(steps, dim=1), at_once)
    # The second sentence does not depend on its padding.
    torch.testing.assert_close(model(source[1:, :2], target[2:3]), at_once[2:3])


def test_it_learns_and_is_validated_with_bleu(trained: Path) -> None:
    first, *_, last = records(trained, "train")
    assert last["loss"] < first["loss"] / 2
    assert [record["bleu"] for record in records(trained, "valid")][-1] > 20
    config = (trained / "checkpoints" / "best" / "config.yaml").read_text()
    assert "task: gru_translation" in config and "hidden-size: 32" in config
    assert "encoder-layers" not in config and "arch:" not in config


def test_a_resumed_run_is_the_same_to_the_bit(data: str, trained: Path, tmp_path: Path) -> None:
    more = ["--save-interval-updates", "40", "--validate-interval-updates", "80"]
    metric = ["--best-checkpoint-metric", "bleu"]
    for updates in ("60", "160"):
        again = run(data, tmp_path / "run", "gru_translation", *more, *metric, "--max-update", updates)
    expected, found = (
        load_file(folder / "checkpoints" / "last" / "model.safetensors") for folder in (trained, again)
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_checkpoints_are_averaged_and_the_mean_translates_with_alignments(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    average([str(trained), "--output", str(tmp_path / "mean"), "--last", "2"])
    (tmp_path / "input").write_text("1 2 3\n4\n\n7 0\n")
    given = ["--model", str(tmp_path / "mean"), "--input", str(tmp_path / "input"), "--device", "cpu"]
    capsys.readouterr()
    generate([*given, "--beam", "5", "--print-alignment"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2] == " ||| "
    for line, num_words in ((lines[0], 3), (lines[1], 1), (lines[3], 2)):
        text, _, links = line.partition(" ||| ")
        pairs = [tuple(map(int, link.split("-"))) for link in links.split()]
        assert [target for _, target in pairs] == list(range(len(text.split())))
        assert all(0 <= source < num_words for source, _ in pairs)


def test_what_it_finds_is_what_it_scores_whatever_the_batch(trained: Path) -> None:
    translator = Translator.load(trained / "checkpoints" / "last")
    assert translator.remarks == []
    lines = ["1 2 3 4", "5", "6 7", "8 9 0", "3"]
    together = translator.translate_with_scores(lines, beam=5)
    for line, (best, *_) in zip(lines, together, strict=True):
        ((alone, *_),) = translator.translate_with_scores([line], beam=5)
        assert alone.text == best.text and alone.score == pytest.approx(best.score, abs=1e-5)
        (scored,) = translator.score_lines([Request(line, reference=best.text)])
        assert scored.hypotheses[0].score == pytest.approx(best.score, abs=1e-5)


def test_a_model_without_attention_trains_and_translates_and_says_that_it_cannot_align(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(data, tmp_path / "run", "mean_translation", "--max-update", "20", "--precision", "bf16")
    assert records(folder, "valid")[-1]["bleu"] >= 0
    (tmp_path / "input").write_text("1 2\n")
    given = ["--model", str(folder / "checkpoints" / "best"), "--input", str(tmp_path / "input")]
    capsys.readouterr()
    generate([*given, "--beam", "5", "--device", "cpu"])
    assert capsys.readouterr().out.count("\n") == 1
    for flags in (["--print-alignment"], ["--plot-attention", str(tmp_path / "pictures")]):
        line = errors(capsys, generate, [*given, "--device", "cpu", *flags])
        assert "a MeanModel has no attention to tell them from. Leave out" in line
    model = MEAN.build(source_vocabulary_size=5, target_vocabulary_size=5, pad_id=PAD_ID)
    assert not isinstance(model, AttendingModel)


def test_what_is_made_for_the_transformer_is_refused_by_name(
    data: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = str(trained / "checkpoints" / "best")
    line = errors(capsys, convert, [model, "--to", "ctranslate2", str(tmp_path / "exported")])
    assert "of the class GruModel and not Transformer" in line
    line = errors(
        capsys, train, [data, "--task", "gru_translation", "--save-dir", str(tmp_path), "--packing", "on"]
    )
    assert "`packing` must be auto or off where" in line
    line = errors(
        capsys, train, [data, "--task", "gru_translation", "--save-dir", "x", "--encoder-layers", "1"]
    )
    assert "`--encoder-layers` is not a known option" in line
    monkeypatch.setattr("nmt.translation.loading.check_int8", lambda device: None)  # of any processor
    (tmp_path / "input").write_text("1 2\n")
    given = ["--model", model, "--input", str(tmp_path / "input"), "--device", "cpu", "--precision"]
    assert "with a GruModel, but is int8, which is made" in errors(capsys, generate, [*given, "int8"])
    generate([*given, "bf16"])
    assert "a GruModel has no form for other types: translations are by the model as it is, in float32" in (
        capsys.readouterr().err
    )
    (tmp_path / "output").write_text("b c\n")
    score(["--hypothesis", str(tmp_path / "output"), *given[:-1]])
    assert float(capsys.readouterr().out.split()[0]) < 0


def test_it_is_about_as_short_as_the_readme_says() -> None:
    num_lines = len((FOLDER / "gru_model.py").read_text().splitlines())
    assert f"in {num_lines} lines" in (FOLDER / "README.md").read_text()
