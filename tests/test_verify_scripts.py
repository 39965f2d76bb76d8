"""The scripts by which users prove exactness on their own configuration, on a small corpus, in real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.digits import preprocess, write_digits

SCRIPTS = Path(__file__).parent.parent / "scripts"
CONFIG = """
encoder-layers: 1
decoder-layers: 1
encoder-embed-dim: 16
decoder-embed-dim: 16
encoder-ffn-embed-dim: 32
decoder-ffn-embed-dim: 32
encoder-attention-heads: 2
decoder-attention-heads: 2
share-all-embeddings: yes
dropout: 0.1
max-tokens: 2000
window-size: 1500
lr: 1e-3
lr-scheduler: cosine
max-update: 100
clip-norm: 1.0
patience: 50
eval-bleu: no
device: cpu
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    preprocess(folder, folder / "data")
    path = folder / "config.yaml"
    path.write_text(f"data: {folder / 'data'}\nsave-dir: {folder / 'run'}\n{CONFIG}")
    return path


def run(script: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, SCRIPTS / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_gradients_are_verified(config: Path) -> None:
    result = run("verify_gradients.py", config, "--max-tokens", 200)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[:4] for line in lines[2:6]] == [
        ["1", "x", "1", "0"],
        ["1", "x", "4", "0"],
        ["2", "x", "2", "2"],
        ["4", "x", "1", "2"],
    ]
    assert lines[-1].startswith("The same update in 4 of 4 layouts")


@pytest.mark.slow
def test_a_gradient_that_is_wrong_is_found(config: Path, tmp_path: Path) -> None:
    """With a trainer that counts a filler's targets, too."""
    source = (SCRIPTS / "verify_gradients.py").read_text()
    broken = source.replace(
        "def train_rank(",
        "Trainer._count_right = Trainer._count\n"
        "Trainer._count = lambda self, batches, *a: "
        "self._count_right([b._replace(weight=1.0) for b in batches], *a)\n\n\ndef train_rank(",
    )
    assert broken != source
    path = tmp_path / "broken.py"
    path.write_text(broken)
    result = run(str(path), config, "--max-tokens", 200)
    assert result.returncode == 1, result.stderr
    assert result.stdout.count("DIFFERS") == 2 and "NOT the same update" in result.stdout


@pytest.mark.slow
def test_resuming_is_verified_across_windows_and_epochs(config: Path) -> None:
    """4,000 pairs in batches of 2,000 tokens and windows of 1,500: three windows an epoch, more than one epoch."""
    result = run("verify_resume.py", "--updates", 36, config, "--required-batch-size-multiple", 1)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    epoch_at_end = int(lines[0].split()[-4])
    assert lines[0].startswith("36 updates, 1 x cpu, epoch ") and epoch_at_end > 1
    epochs = {line.split()[-3] for line in lines[2:-1]}
    assert len(epochs) > 1, "ended in several epochs"
    assert [line.split()[-1] for line in lines[2:-1]] == ["nothing"] * 5
    assert lines[-1] == "Equal, bit by bit."


@pytest.mark.slow
def test_resuming_is_verified_on_two_ranks(config: Path) -> None:
    result = run("verify_resume.py", "--ranks", 2, "--updates", 6, config)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("Equal, bit by bit.\n")


@pytest.mark.slow
def test_what_is_wrong_with_the_configuration_is_one_line(config: Path) -> None:
    for script in ("verify_gradients.py", "verify_resume.py"):
        result = run(script, config, "--max-tokns", 5)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1 and "--max-tokens" in result.stderr, result.stderr
