"""The commands through their real entry points: a model learns to reverse strings of digits."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from support.commands import BIN, ENVIRONMENT, run, succeed
from support.digits import preprocess, write_digits

from nmt.cli.train import main as train_command
from nmt.run.run_log import TIMES

SIZES = [
    *(
        "--encoder-layers",
        "2",
        "--decoder-layers",
        "2",
        "--encoder-embed-dim",
        "64",
        "--decoder-embed-dim",
        "64",
    ),
    *("--encoder-ffn-embed-dim", "128", "--decoder-ffn-embed-dim", "128"),
    *("--encoder-attention-heads", "4", "--decoder-attention-heads", "4", "--share-all-embeddings"),
]
TRAINING = [
    *("--max-tokens", "1024", "--lr", "3e-3", "--warmup-updates", "100", "--dropout", "0"),
    *("--lr-scheduler", "cosine", "--max-update", "700", "--validate-interval", "1000"),
    *("--validate-interval-updates", "100", "--best-checkpoint-metric", "bleu", "--device", "cpu"),
]


class Files(NamedTuple):
    text: Path
    data: Path
    run: Path


def refused(command: str, *arguments: object) -> str:
    """Run a command that must fail as bad input does: exit code 2, one line, no traceback."""
    result = run(command, *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"{command}: error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("digits")
    made = Files(folder, folder / "data", folder / "run")
    write_digits(folder)
    preprocess(folder, made.data)
    succeed("nmt-train", made.data, "--save-dir", made.run, *SIZES, *TRAINING)
    return made


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_a_run_never_loads_the_compiler_that_it_was_not_asked_for(
    files: Files, tmp_path: Path, optimizer: str
) -> None:
    """torch._dynamo takes 65 MB and a second, and much in PyTorch imports it by the way."""
    options = ["--optimizer", optimizer, "--max-update", "4", "--save-interval-updates", "2"]
    arguments = [str(files.data), "--save-dir", str(tmp_path / "run"), *SIZES, *options]
    code = (
        f"import sys\nfrom nmt.cli.train import main\nmain({arguments!r})\n"
        "sys.exit('loaded' if 'torch._dynamo' in sys.modules else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "checkpoints" / "last").exists()


@pytest.mark.timeout(300)
def test_it_learns_to_reverse_unseen_strings(files: Files, tmp_path: Path) -> None:
    output, reference = tmp_path / "out.yy", files.text / "test.yy"
    result = succeed(
        *("nmt-generate", "--model", files.run / "checkpoints" / "best", "--input", files.text / "test.xx"),
        *("--output", output, "--reference", reference, "--beam", 5),
    )
    pairs = list(zip(output.read_text().splitlines(), reference.read_text().splitlines(), strict=True))
    assert sum(ours == theirs for ours, theirs in pairs) / len(pairs) > 0.98
    assert re.search(
        r"^BLEU \d+\.\d+ \| nrefs:1\|case:mixed\|eff:no\|tok:13a\|smooth:exp\|version:", result.stdout
    )
    assert re.search(r"^chrF2 \d+\.\d+ \| nrefs:1\|", result.stdout, re.MULTILINE)


def test_each_split_is_measured_against_its_own_references(files: Files) -> None:
    """The test set has three times as many sentences as the validation set; the training set keeps no raw text."""
    for split in ("valid", "test", "train"):
        found = json.loads(
            succeed("nmt-validate", files.run / "checkpoints" / "best", "--split", split).stdout
        )
        assert found["split"] == split and found["bleu"] > 90


def test_standard_input_is_translated_in_order_and_blank_stays_blank(files: Files) -> None:
    result = succeed(
        "nmt-generate", "--model", files.run / "checkpoints" / "last", text="1 2 3\n\n7 8 9 1 2\n4 5"
    )
    assert result.stdout == "3 2 1\n\n2 1 9 8 7\n5 4\n"


def test_the_average_is_a_model_folder_like_any_other(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "average"
    succeed("nmt-average", files.run / "checkpoints", "--last", 3, "--output", output)
    folders = sorted((files.run / "checkpoints").glob("update-*"))[-3:]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    for name, mean in load_file(output / "model.safetensors").items():
        torch.testing.assert_close(mean, torch.stack([each[name] for each in weights]).mean(0))
    assert succeed("nmt-generate", "--model", output, text="1 2 3 4 5\n").stdout == "5 4 3 2 1\n"
    assert "must be new" in refused("nmt-average", files.run / "checkpoints", "--output", output)
    few = refused("nmt-average", files.run / "checkpoints", "--last", 99, "--output", tmp_path / "other")
    assert "at least 99 saved checkpoints" in few


def test_the_same_command_says_that_the_run_is_finished(files: Files) -> None:
    result = succeed("nmt-train", files.data, "--save-dir", files.run, *SIZES, *TRAINING)
    assert "resume: from" in result.stderr
    assert "finished: reached max-update 700 | " in result.stderr.splitlines()[-1]


def test_a_yaml_file_and_the_command_line_say_the_same(files: Files, tmp_path: Path) -> None:
    short = ["--max-update", "6", "--log-interval", "1", "--lr", "1e-3", "--no-eval-bleu", "--device", "cpu"]
    succeed("nmt-train", files.data, "--save-dir", tmp_path / "flags", *SIZES, *short, "--max-tokens", 600)
    config = tmp_path / "config.yaml"
    text = f"data: {files.data}\nmax_tokens: 600\nencoder-layers: 1\nlr: 1e-3\neval-bleu: no\ndevice: cpu\n"
    config.write_text(text + "max-update: 6\nlog-interval: 1\n")
    succeed("nmt-train", "--config", config, "--save-dir", tmp_path / "yaml", *SIZES)
    one, other = (
        [
            {name: value for name, value in json.loads(line).items() if name not in TIMES}
            for line in (tmp_path / way / "metrics.jsonl").read_text().splitlines()
        ]
        for way in ("flags", "yaml")
    )
    assert one == other and len(one) == 7


def test_two_ranks_under_torchrun_train_resume_and_agree(files: Files, tmp_path: Path) -> None:
    options = [
        *(files.data, "--save-dir", tmp_path / "run", *SIZES, "--max-tokens", "500", "--update-freq", "2"),
        *(
            "--lr",
            "1e-3",
            "--warmup-updates",
            "10",
            "--log-interval",
            "10",
            "--validate-interval-updates",
            "20",
        ),
        *("--eval-beam", "1", "--max-source-positions", "16", "--max-target-positions", "16"),
    ]
    first = train_on_ranks(2, *options, "--max-update", 20)
    assert "2 x cpu" in first and first.count("finished: reached max-update 20") == 1
    assert "resume: from" in train_on_ranks(2, *options, "--max-update", 40)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]
    assert len(losses) == 4 and losses[3] < losses[0]


def train_on_ranks(num_ranks: int, *arguments: object) -> str:
    """Run nmt-train under torchrun and return what it says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks]
    command += ["-m", "nmt.cli.train", *arguments, "--device", "cpu"]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, timeout=280
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.slow
def test_three_ranks_that_were_stopped_end_like_three_that_were_not(files: Files, tmp_path: Path) -> None:
    """From three ranks on the order in which gradients are summed over ranks shows in their last bits."""
    options = [
        files.data,
        *SIZES,
        "--max-tokens",
        "500",
        "--lr",
        "1e-3",
        "--dropout",
        "0.1",
        "--no-eval-bleu",
    ]
    train_on_ranks(3, *options, "--save-dir", tmp_path / "whole", "--max-update", 8)
    for max_update in (5, 8):
        train_on_ranks(3, *options, "--save-dir", tmp_path / "parts", "--max-update", max_update)
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, parts = (
            load_file(tmp_path / way / "checkpoints" / "last" / name) for way in ("whole", "parts")
        )
        assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_ends_like_one_that_is_not(files: Files, tmp_path: Path) -> None:
    options = [*SIZES, "--max-tokens", "600", "--lr", "1e-3", "--max-update", "60", "--no-eval-bleu"]
    options += ["--save-interval-updates", "3", "--keep-last", "2", "--dropout", "0.2", "--device", "cpu"]
    succeed("nmt-train", files.data, "--save-dir", tmp_path / "whole", *options)
    rng = random.Random()
    for _ in range(4):
        process = subprocess.Popen(
            [BIN / "nmt-train", files.data, "--save-dir", tmp_path / "killed", *options],
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        time.sleep(rng.uniform(2, 7))
        process.send_signal(signal.SIGKILL)
        process.wait()
    succeed("nmt-train", files.data, "--save-dir", tmp_path / "killed", *options)
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, killed = (
            load_file(tmp_path / way / "checkpoints" / "last" / name) for way in ("whole", "killed")
        )
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_bad_input_to_training_is_one_clear_line(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = (files.data, "--save-dir", tmp_path / "new")
    assert "Perhaps you meant `--max-tokens`" in refused("nmt-train", *new, "--max-token", "5")

    def refused_here(*arguments: object) -> str:
        """Do in this process what `refused` does in one of its own, which takes seconds to begin."""
        with pytest.raises(SystemExit) as end:
            train_command(list(map(str, arguments)))
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert said.startswith("nmt-train: error: ") and said.count("\n") == 1, said
        return said

    assert "transformer_tiny" in refused_here(*new, "--arch", "transformer_tin")
    assert "must be a data directory" in refused_here(tmp_path / "nowhere", "--save-dir", tmp_path / "new")
    assert "`label-smoothing` must be" in refused_here(*new, "--label-smoothing", "1.5")
    assert "must be a multiple" in refused_here(*new, "--encoder-embed-dim", "30")
    assert "one of loss, nll, ppl, bleu" in refused_here(*new, "--best-checkpoint-metric", "x")
    assert "`max-target-positions`" in refused_here(*new, *SIZES, "--max-target-positions", "5")
    config = tmp_path / "config.yaml"
    config.write_text("max-tokens: many\n")
    assert f"{config}: `max-tokens` must be" in refused_here(*new, "--config", config)
    config.write_text("max-tokns: 5\n")
    assert "`max-tokens`" in refused_here(*new, "--config", config)
    assert "missing.yaml" in refused_here(*new, "--config", tmp_path / "missing.yaml")
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_another_model_or_vocabulary_may_not_take_up_a_run(files: Files, tmp_path: Path) -> None:
    resume = ("nmt-train", files.data, "--save-dir", files.run, *TRAINING)
    line = refused(*resume, *SIZES, "--encoder-layers", "3")
    assert "`encoder-layers` may not change" in line and "it was 2" in line and "but is 3" in line
    rng = random.Random(2)
    for split in ("train", "valid", "test"):
        for language in ("xx", "yy"):
            letters = [" ".join(rng.choices("abcdefghijkl0123", k=5)) for _ in range(50)]
            (tmp_path / f"{split}.{language}").write_text("\n".join(letters))
    preprocess(tmp_path, tmp_path / "data")
    line = refused("nmt-train", tmp_path / "data", "--save-dir", files.run, *TRAINING, *SIZES)
    assert "must be the one that the run began with" in line
