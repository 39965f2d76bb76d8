"""The toolkit from Python: what the documentation shows is run as it stands there."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import math
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nmt
from nmt.cli.preprocess import main as preprocess
from nmt.config.fields import list_options
from nmt.data.options import PreprocessOptions
from nmt.errors import UserError
from nmt.options import OptimizationOptions, TrainConfig
from nmt.translation.options import TranslationOptions

ROOT = Path(__file__).parent.parent
WITH_EXAMPLES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "nmt").rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
}
# They need a model.
RUN_ELSEWHERE = {"nmt.translation.translator", "nmt.vision.classifier"}


@pytest.mark.parametrize("module", sorted(WITH_EXAMPLES - RUN_ELSEWHERE))
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
    assert dir(nmt) == sorted([*nmt.__all__, "__version__"])
    assert list(nmt.__all__) == sorted(nmt.__all__)
    with pytest.raises(AttributeError, match="no attribute `trian`"):
        _ = nmt.trian


def test_type_checkers_see_each_name_where_it_is_found() -> None:
    tree = ast.parse(Path(nmt.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == nmt._PLACES
    assert seen.keys() == set(nmt.__all__)


@pytest.mark.parametrize("function", [nmt.preprocess, nmt.average, nmt.score])
def test_every_parameter_and_result_has_a_type(function: Any) -> None:
    signature = inspect.signature(function)
    annotations = [parameter.annotation for parameter in signature.parameters.values()]
    assert inspect.Signature.empty not in [*annotations, signature.return_annotation]


def test_preprocess_takes_the_options_of_the_command_with_their_defaults() -> None:
    parameters = dict(inspect.signature(nmt.preprocess).parameters)
    del parameters["log"]
    fields = {field.name: field.default for field in dataclasses.fields(PreprocessOptions)}
    assert parameters.keys() == fields.keys()
    for name, parameter in parameters.items():
        missing = fields[name] is dataclasses.MISSING
        assert parameter.default == (inspect.Parameter.empty if missing else fields[name])


def test_looking_at_the_names_loads_no_torch() -> None:
    code = (
        "import inspect, sys, nmt; dir(nmt)\n"
        "for name in ('preprocess', 'average', 'score', 'train_config', 'UserError'):\n"
        "    getattr(nmt, name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_the_commands_do_is_done_from_python(tmp_path: Path) -> None:
    for language in ("en", "de"):
        (tmp_path / f"train.{language}").write_text("".join(f"{i} is a number\n" for i in range(300)))
    said: list[str] = []
    data = nmt.preprocess(
        source_lang="en",
        target_lang="de",
        trainpref=str(tmp_path / "train"),
        destdir=str(tmp_path / "DATA"),
        vocab_size=300,
        log=said.append,
    )
    assert data == tmp_path / "DATA" and (data / "preprocess.json").is_file()
    assert said[-1] == f"{data}: complete"
    with pytest.raises(UserError, match="`vocab-size` must be from 1 to"):
        nmt.preprocess(source_lang="en", target_lang="de", trainpref="x", destdir="y", vocab_size=10**10)
    with pytest.raises(UserError, match="must be a run or its `checkpoints` folder"):
        nmt.average(tmp_path, tmp_path / "MODEL")
    with pytest.raises(UserError, match="must be left out"):
        nmt.average(tmp_path, tmp_path / "MODEL", last=1, best=1)


@pytest.mark.parametrize(
    ("translations", "references", "text"),
    [
        ("a", ["a"], "must be a list of lines"),
        (["a"], "a", "must be a list of lines"),
        (["a"], ["a", "b"], "2 for 1"),
        ([], [], "0 for 0"),
        ([None], ["a"], "`translations` must be lines of text, but one is None"),
    ],
)
def test_scores_of_what_does_not_fit_are_refused(translations: Any, references: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        nmt.score(translations, references)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"model_type": "words"}, "`model-type` must be .*but is"),
        ({"normalization": "nfd"}, "`normalization` must be .*but is"),
        ({"vocab_size": "many"}, "`vocab-size` must be a whole number, but is 'many'"),
        ({"workers": 1.5}, "`workers` must be a whole number, but is 1.5"),
    ],
)
def test_preprocess_refuses_values_of_another_kind(option: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text):
        nmt.preprocess(source_lang="en", target_lang="de", trainpref="T", destdir=tmp_path / "D", **option)
    assert not (tmp_path / "D").exists()


def test_train_refuses_what_is_no_configuration() -> None:
    with pytest.raises(UserError, match=r"`config` must be a configuration, but is a dict\."):
        nmt.train({"data": "DATA"})  # type: ignore[arg-type]


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


class Mute:
    """Has no text for itself."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


STRANGE = [
    *(object(), Mute(), {"a": 1}, {1}, b"x", 1j, int, ..., len, torch.zeros(3), np.zeros(3), np.array("x")),
    *(10**400, 10**5000, math.nan, -math.inf, "\ud800", "\0", "x" * 100_000, [[1]], [Mute()], (1, 2, 3, 4)),
    OptimizationOptions(),
]


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: type(value).__name__)
def test_no_value_of_an_option_ends_in_anything_but_one_line(value: Any) -> None:
    for option in list_options(TrainConfig[TranslationOptions]):
        try:
            nmt.train_config(**{"data": "DATA", "save_dir": "RUN", option.name: value})
        except UserError as error:
            assert option.key in str(error) and len(str(error)) < 500
        else:
            assert isinstance(value, str | float | int)


def test_numbers_of_numpy_are_numbers() -> None:
    config = nmt.train_config(data="DATA", save_dir="RUN", max_update=np.int64(5), lr=np.float32(0.5))
    assert (config.optimization.max_update, config.optimization.lr) == (5, 0.5)
    assert type(config.optimization.max_update) is int and type(config.optimization.lr) is float


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"optimization": OptimizationOptions(lr="much")}, "`lr` must be a number, but is 'much'"),  # type: ignore[arg-type]
        (
            {"optimization": OptimizationOptions(lr="0.1")},
            "`lr` must be of type float, but is the text '0.1'",
        ),  # type: ignore[arg-type]
        ({"save_dir": "RUN"}, "`save-dir` must be of type Path, but is the text 'RUN'"),
        ({"batching": 3}, "`batching` must be BatchingOptions, but is 3"),
        ({"checkpoints": OptimizationOptions()}, "`checkpoints` must be CheckpointOptions, but is"),
        ({"task_options": TranslationOptions}, "`task-options` must be a dataclass of options, but is"),
        ({"log_interval": None}, "`log-interval` must be a whole number, but is None"),
    ],
)
def test_a_configuration_that_was_made_by_hand_holds_what_it_must(changes: dict[str, Any], text: str) -> None:
    config = TrainConfig(task_options=TranslationOptions(data=Path("DATA")), save_dir=Path("RUN"))
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        nmt.train(dataclasses.replace(config, **changes))
    assert "nmt.train_config(...)" in str(caught.value)


@pytest.mark.parametrize("name", ["average", "preprocess", "score", "train", "train_config"])
def test_signatures_say_what_is_taken(name: str) -> None:
    function = getattr(nmt, name)
    hints = typing.get_type_hints(function, localns={"Score": None})
    taken = set(inspect.signature(function).parameters)
    assert taken <= hints.keys() and "return" in hints
    assert [parameter for parameter in taken if hints[parameter] is Any] == []
