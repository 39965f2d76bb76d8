"""What scripts/bench/train.py counts, against PyTorch's own counter."""

import importlib.util
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.pair_task import ALL, SIZES, PairTask, collate
from torch.utils.flop_counter import FlopCounterMode

from nmt.models.transformer import Transformer


def load_script() -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / "bench" / "train.py"
    spec = importlib.util.spec_from_file_location("bench_train", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder_layers": 3, "decoder_layers": 1},
        {"encoder_ffn_embed_dim": 8, "decoder_ffn_embed_dim": 24},
    ],
)
def test_the_count_of_products_is_pytorchs(changes: dict[str, Any]) -> None:
    bench = load_script()
    options = replace(SIZES, **changes)
    model = Transformer(options, source_vocabulary_size=15, target_vocabulary_size=15, pad_id=1).double()
    batch = collate(ALL)
    with FlopCounterMode(display=False) as counter:
        PairTask().compute_loss(model, batch).loss.backward()
    pairs = bench.sentence_lengths(batch, padded=True)
    counted = bench.count_flops(pairs, batch.num_targets, options, vocabulary_size=15)
    assert counted == counter.get_total_flops()


def test_padding_is_left_out_of_the_work_that_a_batch_needs() -> None:
    bench = load_script()
    batch = collate([0, 1, 2])
    lengths = list(bench.sentence_lengths(batch, padded=False))
    assert sum(target for _, target in lengths) == batch.num_targets
    # One layer of width 2 on either side, by hand: one source and one target token, five types.
    one = replace(SIZES, decoder_layers=1, encoder_embed_dim=2, decoder_embed_dim=2)
    one = replace(one, encoder_ffn_embed_dim=3, decoder_ffn_embed_dim=3)
    encoder = 4 * 4 + 2 * 6 + 2 * 2  # projections, feed-forward, scores and their sum
    decoder = 6 * 4 + 2 * 6 + 2 * 2 + 2 * 2 + 2 * 4  # and keys and values of the source
    expected = 6 * (encoder + decoder + 2 * 5)
    assert math.isclose(bench.count_flops(iter([(1, 1)]), 1, one, vocabulary_size=5), expected)


@pytest.mark.slow
def test_the_script_runs_and_reports_both_precisions() -> None:
    script = Path(__file__).parent.parent / "scripts" / "bench" / "train.py"
    small = ["--encoder-layers", "1", "--decoder-layers", "1", "--max-tokens", "512"]
    command = [sys.executable, str(script), "--precision", "fp32", "bf16", "--rounds", "1", "--updates", "2"]
    done = subprocess.run([*command, *small], check=True, capture_output=True, text=True)
    for precision in ("fp32", "bf16"):
        (line,) = re.findall(rf"^{precision} +[0-9].*$", done.stdout, flags=re.MULTILINE)
        # Counted in thousands with commas: tokens a second, of which there must be some.
        assert int(line.split()[1].replace(",", "")) > 0
