"""The shell scripts: they parse, can be run, and check what they download."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("examples/*/*.sh"), ROOT / ".ci" / "run"])
SOURCED = {"environment.sh"}
RUN_MULTI30K = ROOT / "examples" / "multi30k" / "run.sh"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_script_parses(script: Path) -> None:
    result = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name not in SOURCED], ids=name_of)
def test_script_is_executable_and_stops_at_the_first_error(script: Path) -> None:
    assert script.stat().st_mode & 0o111
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


def test_a_python_script_that_names_its_interpreter_is_executable() -> None:
    scripts = [path for path in ROOT.glob("scripts/**/*.py") if path.read_bytes().startswith(b"#!")]
    assert scripts and [name_of(path) for path in scripts if not path.stat().st_mode & 0o111] == []


def test_ci_runs_the_tests_then_lint() -> None:
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands[-2:] == ["./scripts/test.sh", "./scripts/lint.sh"]


def test_every_downloaded_text_has_a_pinned_hash() -> None:
    pinned = re.findall(r"^(\S+)\.(en|de) +([0-9a-f]{64})$", RUN_MULTI30K.read_text("utf-8"), re.MULTILINE)
    sides = [(split, language) for split in ("train", "val", "test_2016_flickr") for language in ("en", "de")]
    assert [(split, language) for split, language, _ in pinned] == sides
    assert len({digest for _, _, digest in pinned}) == len(sides)


def test_multi30k_with_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    result = subprocess.run([RUN_MULTI30K, tmp_path / "lost"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == f"error: DATA_DIR must be a folder, but there is no {tmp_path / 'lost'}.\n"


@pytest.mark.parametrize(
    ("code", "called"),
    [
        (0, ["nmt-preprocess", "nmt-train", "nmt-average", "nmt-generate"]),
        (75, ["nmt-preprocess", "nmt-train"]),
        (2, ["nmt-preprocess", "nmt-train"]),
    ],
)
def test_multi30k_takes_no_half_model_for_a_whole_one(tmp_path: Path, code: int, called: list[str]) -> None:
    """With commands that do nothing but say that they were called; the training leaves two checkpoints."""
    script = tmp_path / "examples" / "multi30k" / "run.sh"
    for folder in (script.parent, tmp_path / "scripts", tmp_path / "bin", tmp_path / "text"):
        folder.mkdir(parents=True)
    script.write_bytes(RUN_MULTI30K.read_bytes())
    (tmp_path / "scripts" / "environment.sh").write_text(
        f'BIN={tmp_path}/bin\nsay() {{ echo "== $*"; }}\nmake_environment() {{ :; }}\n'
    )
    for name in ("nmt-preprocess", "nmt-train", "nmt-average", "nmt-generate"):
        command = tmp_path / "bin" / name
        ends = code if name == "nmt-train" else 0
        says = f"echo {name} >>{tmp_path}/called\necho {name} $* >>{tmp_path}/arguments"
        command.write_text(f"#!/bin/sh\n{says}\nexit {ends}\n")
        command.chmod(0o755)
    for lang in ("en", "de"):
        (tmp_path / "text" / f"test_1.{lang}").write_text("a\n")
    for update in (1, 2):
        (tmp_path / "out" / "run" / "checkpoints" / f"update-{update:07}").mkdir(parents=True)
    result = subprocess.run(
        ["bash", script, tmp_path / "text", tmp_path / "out"], capture_output=True, text=True
    )
    assert result.returncode == code, result.stderr
    assert (tmp_path / "called").read_text().split() == called
    assert (" --last 2 " in (tmp_path / "arguments").read_text()) == (code == 0)  # of ten at most
    assert ("the same command goes on with the training" in result.stdout) == (code == 75)
