"""What model folders tell: how the model was trained, and nothing of the machine; a run still finds its data."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fairseq_model import PLAIN, checkpoint, make_weights, write_dictionaries
from support.tiny_translation_model import NOUNS
from support.toy_task import PointOptions

from nmt.checkpoints.model_folder import average_models, load_config, load_model
from nmt.cli.preprocess import main as preprocess
from nmt.cli.train import main as train
from nmt.cli.validate import main as validate
from nmt.config.mapping import changed_fixed_options, from_mapping, path_options, to_mapping
from nmt.config.untold import UNTOLD, hide_places
from nmt.data.segmenter_file import without_paths
from nmt.interop.fairseq import convert_checkpoint

KEPT = Path(__file__).parent / "data" / "checkpoints-2"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that went on, with absolute paths for all that it was told."""
    shutil.copytree(KEPT, tmp_path / "home", symlinks=True)
    run = tmp_path / "home" / "run"
    places = ["--data", str(tmp_path / "home" / "data"), "--save-dir", str(run)]
    train(
        [
            places[1],
            *places[2:],
            "--config",
            str(run / "config.yaml"),
            "--max-update",
            "10",
            "--no-eval-bleu",
            "--eval-beam",
            "None",
        ]
    )
    return run


def mentions(folder: Path, text: str) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if text.encode() in path.read_bytes()]


def test_no_file_of_a_checkpoint_names_a_place(run: Path, tmp_path: Path) -> None:
    newest = run / "checkpoints" / "update-0000010"
    assert (newest / "state.json").is_file()
    assert mentions(newest, str(tmp_path)) == [] == mentions(newest, str(Path.home()))
    assert str(tmp_path) in (run / "config.yaml").read_text()
    average_models([newest, newest], tmp_path / "mean")
    assert mentions(tmp_path / "mean", str(tmp_path)) == []
    load_model(tmp_path / "mean")


def test_a_converted_model_names_no_place(tmp_path: Path) -> None:
    sizes = {"source_size": 16, "target_size": 24}
    write_dictionaries(tmp_path, **sizes)
    torch.save(checkpoint(PLAIN, make_weights(PLAIN, **sizes)), tmp_path / "checkpoint.pt")
    convert_checkpoint(
        tmp_path / "checkpoint.pt", tmp_path, tmp_path / "model", source_lang=None, target_lang=None
    )
    assert mentions(tmp_path / "model", str(tmp_path)) == []
    load_model(tmp_path / "model")


def test_a_model_in_its_run_knows_the_paths_of_the_run(run: Path, tmp_path: Path) -> None:
    inside = load_config(run / "checkpoints" / "best")
    assert inside.task_options.data == tmp_path / "home" / "data" and inside.save_dir == run
    shutil.copytree(run / "checkpoints" / "best", tmp_path / "copy")
    copied = load_config(tmp_path / "copy")
    assert "does not tell" in str(copied.task_options.data)
    assert changed_fixed_options(copied, inside) == []


def test_a_run_goes_on_and_its_model_is_measured(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(["--config", str(run / "config.yaml"), "--max-update", "12"])
    assert "resume: from" in (run / "train.log").read_text()
    capsys.readouterr()
    validate([str(run / "checkpoints" / "best")])
    inside = json.loads(capsys.readouterr().out)
    shutil.copytree(run / "checkpoints" / "best", tmp_path / "copy")
    validate([str(tmp_path / "copy"), str(tmp_path / "home" / "data")])
    assert json.loads(capsys.readouterr().out) == inside
    with pytest.raises(SystemExit) as end:
        validate([str(tmp_path / "copy")])
    assert end.value.code == 2
    assert "data" in capsys.readouterr().err.lower()


def test_a_given_sentencepiece_model_loses_the_paths_of_its_training(tmp_path: Path) -> None:
    text = tmp_path / "text.xx"
    text.write_text("".join(f"the {noun} sees a {other}\n" for noun in NOUNS for other in NOUNS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "given"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    foreign = (tmp_path / "given.model").read_bytes()
    assert str(tmp_path).encode() in foreign
    shutil.copy(text, tmp_path / "text.yy")
    arguments = ["--source-lang", "xx", "--target-lang", "yy", "--trainpref", str(tmp_path / "text")]
    arguments += ["--sentencepiece-model", str(tmp_path / "given.model"), "--destdir", str(tmp_path / "data")]
    preprocess(arguments)
    kept = (tmp_path / "data" / "sentencepiece.model").read_bytes()
    assert str(tmp_path).encode() not in kept
    assert without_paths(kept) == kept
    before, after = (sentencepiece.SentencePieceProcessor(model_proto=model) for model in (foreign, kept))
    lines = text.read_text().splitlines()
    assert before.encode(lines, out_type=str) == after.encode(lines, out_type=str)


@given(st.binary(max_size=50))
def test_what_is_no_sentencepiece_model_is_left_to_its_reader(content: bytes) -> None:
    assert len(without_paths(content)) <= len(content)


@dataclass(frozen=True)
class Inner:
    lexicon: Path | None = None
    """A path that need not be given."""
    name: str = "x"
    """No path."""


@dataclass(frozen=True)
class Outer:
    places: tuple[Path, ...]
    """Several paths."""
    inner: Inner = field(default_factory=Inner)


def test_options_of_every_kind_of_path_are_left_out() -> None:
    options = Outer(places=(Path("/a"), Path("b")), inner=Inner(lexicon=Path("/c")))
    assert to_mapping(options, with_paths=False) == {"lexicon": UNTOLD, "name": "x"}
    assert to_mapping(Outer(places=()), with_paths=False)["lexicon"] is None
    assert [option.key for option in path_options(Outer) if option.is_required] == ["places"]
    assert [option.key for option in path_options(Outer)] == ["places", "lexicon"]
    assert from_mapping(Outer, to_mapping(options), where="here") == options


@dataclass(frozen=True)
class PlacedOptions(PointOptions):
    lexicon: str = field(default="", metadata={"fixed": True})
    """Text that names a file."""
    arguments: tuple[str, ...] = ()
    """Texts some of which do."""


@pytest.fixture
def placed_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "plugin" / "placed-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: placed\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[nmt.tasks]\nplaced = test_model_config:PlacedOptions\n")
    monkeypatch.syspath_prepend(metadata.parent)


@pytest.mark.usefixtures("placed_plugin")
def test_a_place_that_a_plugin_holds_as_text_is_told_by_the_run_alone(tmp_path: Path) -> None:
    lexicon, run = str(tmp_path / "lexicon.txt"), tmp_path / "run"
    given = ["--task", "placed", "--save-dir", str(run), "--lexicon", lexicon, "--arguments", "a=1"]
    given += [f"b={lexicon}", lexicon, "--max-tokens", "None", "--batch-size", "32", "--device", "cpu"]
    train([*given, "--max-update", "2"])
    folder = run / "checkpoints" / "last"
    assert mentions(folder, str(tmp_path)) == []
    assert load_config(folder).task_options == PlacedOptions(
        lexicon=lexicon, arguments=("a=1", f"b={lexicon}", lexicon)
    )
    shutil.copytree(folder, tmp_path / "copy")
    assert load_config(tmp_path / "copy").task_options == PlacedOptions(
        lexicon=UNTOLD, arguments=("a=1", f"b={UNTOLD}", UNTOLD)
    )
    train([*given, "--max-update", "3"])
    assert (
        "resume: from" in (run / "train.log").read_text()
        and " lexicon " not in (run / "train.log").read_text()
    )


@pytest.mark.parametrize(
    "text", ["", "/", "/s/", "a/b", "x=", "=", "n=/", "/no/such/folder", "\0", "/tmp\0/x/y"]
)
def test_text_that_is_no_place_is_told(text: str) -> None:
    assert hide_places(text) == text


@settings(deadline=None)  # it asks the disk
@given(st.text(alphabet="/=ab .\0"))
def test_whatever_is_hidden_stays_so(text: str) -> None:
    assert hide_places(hide_places(text)) == hide_places(text)
