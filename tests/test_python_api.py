"""The toolkit from Python: what the documentation shows is run as it stands there."""

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import nmt
from nmt.cli.preprocess import main as preprocess
from nmt.errors import UserError
from nmt.options import OptimizationOptions, TrainConfig
from nmt.translation.options import TranslationOptions

ROOT = Path(__file__).parent.parent
WITH_A_MODEL = {"nmt.translation.translator"}  # whose examples test_translator.py runs beside a trained model
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "nmt").rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)
WITH_EXAMPLES = [module for module in WITH_EXAMPLES if module not in WITH_A_MODEL]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings_are_true(module: str) -> None:
    done = doctest.testmod(importlib.import_module(module))
    assert done.failed == 0 < done.attempted


def test_flat_options_make_the_nest() -> None:
    config = nmt.train_config(data="DATA", save_dir="RUN", lr=0.1, adam_betas=(0.5, 0.6), eval_bleu=False)
    assert config == TrainConfig(
        task_options=TranslationOptions(data=Path("DATA"), eval_bleu=False),
        save_dir=Path("RUN"),
        optimization=OptimizationOptions(lr=0.1, adam_betas=(0.5, 0.6)),
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"save_dir": "RUN"}, "train_config: `data` must be given. Give data=VALUE."),
        ({"data": "DATA"}, "train_config: `save-dir` must be given. Give save_dir=VALUE."),
        ({"lr": "much"}, "train_config: `lr` must be a number, but is 'much'."),
        ({"max_update": 1.5}, "train_config: `max-update` must be a whole number, but is 1.5."),
        ({"arch": "transformer_tny"}, "Perhaps you meant `transformer_tiny`?"),
        ({"lr": -1.0, "data": "DATA", "save_dir": "RUN"}, "train_config: `lr` must be above 0"),
        ({"task": "translaton"}, "Perhaps you meant `translation`?"),
    ],
)
def test_mistakes_are_told_as_on_the_command_line(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=re.escape(text)):
        nmt.train_config(**options)


def test_the_public_names_are_there() -> None:
    assert all(getattr(nmt, name).__name__ == name for name in nmt.__all__)
    with pytest.raises(AttributeError, match="no attribute `trian`"):
        _ = nmt.trian


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_what_the_page_shows_trains_translates_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for split, lines in (("train", 4000), ("valid", 20)):
        text = "".join(f"{i % 7} {i % 11} {i % 13}\n" for i in range(lines))
        for language in ("xx", "yy"):
            (tmp_path / f"{split}.{language}").write_text(text)
    files = ["--trainpref", "train", "--validpref", "valid", "--destdir", "DATA"]
    preprocess(
        ["--source-lang", "xx", "--target-lang", "yy", *files, "--vocab-size", "290", "--workers", "1"]
    )
    capsys.readouterr()
    draw, train = code_blocks("seeing.md")
    names: dict[str, Any] = {}
    exec(train, names)
    reason, validations, translations = capsys.readouterr().out.splitlines()
    assert reason == "reached max-update 60"
    assert {20, 40, 60} <= {update for update, _ in eval(validations)}
    assert len(eval(translations)) == 1
    result = names["result"]
    assert isinstance(result, nmt.TrainingResult) and result.best == Path("RUN/checkpoints/best")
    assert (result.best / "model.safetensors").is_file()
    again = nmt.train(names["config"])
    assert again == result  # a finished run: nothing is added
    exec(draw, names)
    assert (tmp_path / "bleu.svg").read_text().startswith("<?xml")
