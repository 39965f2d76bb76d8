#!/usr/bin/env python
"""Measure how fast a model translates: the whole process from text to text, and the decoding alone.

    scripts/bench/generate.py MODEL INPUT [--reference REF] [--beam 5 1] [--precision fp32 bf16 int8] [--threads N]
                              [--peer ctranslate2] [--baseline CHECKOUT] [--rounds 3] [--latency 100] [--warm]

MODEL is a model folder, INPUT text, a sentence a line. Each round runs each engine once, in a process of its own,
in turn, so that a machine that becomes slower becomes slower for all. The medians over rounds are printed:

  decoding   sentences/s and output tokens/s from text to pieces, after one sentence; with --warm after all of them
  CPU        seconds of processor time that the decoding took: steadier than the clock where others compute too
  process    seconds from the start of the process to the last line of text
  first      seconds from the start of the process to the first translation, of the first line alone
  p50, p95   milliseconds for a sentence by itself, over the first `--latency` sentences
  memory     the largest resident set of the process

Engines: nmt in each precision; with --peer ctranslate2, CTranslate2 in float32 and int8 on the same weights,
sentences and threads, which work on one batch together or on one each (`at once`; in nmt always the latter); the
model is exported by `nmt-convert --to ctranslate2`, or already lies in --peer-model DIR; with --baseline CHECKOUT,
the package in another checkout of this repository.

The floor is counted: the multiply-adds of the products that a decoder row and an encoder position need, times
their numbers without any padding or waiting, over the rate at which this machine makes a decoder step's products,
measured in each round.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
ROWS = 320  # of the products whose rate is measured: 64 sentences with 5 hypotheses each


def main() -> None:
    args = parse_arguments()
    if args.worker is not None:
        work(json.loads(args.worker))
        return
    with TemporaryDirectory() as folder:
        engines = list_engines(args, Path(folder))
        for beam in args.beam:
            counts = run({**common(args, beam), "engine": "count"}, CHECKOUT)
            rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
            # Of int8 there is no one rate: some of its products are of bfloat16.
            rates: dict[str, list[float]] = {x: [] for x in args.precision if x != "int8"}
            for number in range(args.rounds):
                for name, (options, checkout) in engines.items():
                    latency = args.latency if number == 0 else 0
                    job = {**common(args, beam), **options, "latency": latency}
                    rounds[name].append(run(job, checkout))
                for precision, found in rates.items():
                    found.append(
                        run({**common(args, beam), "engine": "rate", "precision": precision}, CHECKOUT)[
                            "rate"
                        ]
                    )
            report(beam, rounds, counts, {name: statistics.median(x) for name, x in rates.items()}, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("input", nargs="?", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--beam", nargs="+", type=int, default=[5, 1])
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"], choices=("fp32", "bf16", "int8"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--max-tokens", type=int, help="largest batch of nmt; its own choice if left out")
    parser.add_argument("--max-length", type=int, default=200, help="most tokens of a translation")
    parser.add_argument("--peer", choices=("ctranslate2",))
    parser.add_argument("--peer-model", type=Path, help="the model as CTranslate2 reads it")
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=int, default=100)
    parser.add_argument("--lines", type=int, help="use the first lines of the input only")
    parser.add_argument("--warm", action="store_true", help="time the second pass of each process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is None and args.input is None:
        parser.error("name a model folder and a text")
    return args


def common(args: argparse.Namespace, beam: int) -> dict[str, Any]:
    names = ("model", "input", "reference", "threads", "max_tokens", "max_length", "lines", "warm")
    values = {name: getattr(args, name) for name in names}
    paths = {name: str(value.resolve()) for name, value in values.items() if isinstance(value, Path)}
    return {**values, **paths, "beam": beam, "latency": 0}


def list_engines(args: argparse.Namespace, folder: Path) -> dict[str, tuple[dict[str, Any], Path]]:
    """Name what is compared: the options of each worker, and the checkout that it imports."""
    engines: dict[str, tuple[dict[str, Any], Path]] = {
        f"nmt {precision}": ({"engine": "nmt", "precision": precision}, CHECKOUT)
        for precision in args.precision
    }
    if args.baseline is not None:
        engines["baseline"] = ({"engine": "nmt", "precision": None}, args.baseline.resolve())
    if args.peer is not None:
        exported = args.peer_model
        if exported is None:
            exported = folder / "ctranslate2"
            command = [
                sys.executable,
                "-m",
                "nmt.cli.convert",
                str(args.model.resolve()),
                "--to",
                "ctranslate2",
                str(exported),
            ]
            subprocess.run(command, check=True, stdout=sys.stderr, cwd=CHECKOUT)
        for kind in ("float32", "int8"):
            for at_once in sorted({1, args.threads}):
                options = {
                    "engine": "ctranslate2",
                    "kind": kind,
                    "exported": str(exported.resolve()),
                    "at_once": at_once,
                }
                engines[f"CTranslate2 {kind}, {at_once} at once"] = (options, CHECKOUT)
    return engines


def run(job: dict[str, Any], checkout: Path) -> dict[str, Any]:
    """Let a fresh process work; add the seconds that it lived, and those to its first translation."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(job["threads"])}
    if job["engine"] == "rate":  # of products, not of asking the system for fresh memory at each one
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    job = {**job, "started": time.time()}
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(job)],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def work(job: dict[str, Any]) -> None:
    """Do one job in this process and print what was found as the last line."""
    if job["engine"] in ("count", "rate"):
        print(json.dumps(count(job) if job["engine"] == "count" else {"rate": product_rate(job)}))
        return
    lines = read(job)
    translate, to_text = (nmt_engine if job["engine"] == "nmt" else ctranslate2_engine)(job)
    to_text(translate(lines[:1]))
    first = time.time() - job["started"]
    if job["warm"]:
        translate(lines)
    before, cpu_before = time.perf_counter(), time.process_time()
    pieces = translate(lines)
    seconds, cpu_seconds = time.perf_counter() - before, time.process_time() - cpu_before
    texts = to_text(pieces)
    whole = time.time() - job["started"]
    found = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "process": whole,
        "first": first,
        "tokens": sum(map(len, pieces)),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "latencies": [],
        "texts": texts,
    }
    for line in lines[: job["latency"]]:
        before = time.perf_counter()
        translate([line])
        found["latencies"].append(time.perf_counter() - before)
    print(json.dumps(found))


def read(job: dict[str, Any]) -> list[str]:
    return Path(job["input"]).read_text(encoding="utf-8").removesuffix("\n").split("\n")[: job["lines"]]


def nmt_engine(job: dict[str, Any]) -> tuple[Any, Any]:
    import torch

    from nmt.generation.options import DecodingOptions
    from nmt.translation.translator import Batching, Translator

    torch.set_num_threads(job["threads"])
    precision = {} if job["precision"] is None else {"precision": job["precision"]}
    translator = Translator.load(job["model"], **precision)
    options = DecodingOptions(beam=job["beam"], max_len_a=0, max_len_b=job["max_length"])
    batching = Batching(max_tokens=job["max_tokens"]) if job["max_tokens"] else Batching()

    def translate(lines: list[str]) -> list[list[int]]:
        translations = translator.translate_lines(lines, options, batching=batching)
        return [x.hypotheses[0].tokens if x.hypotheses else [] for x in translations]

    return translate, translator.task.target_segmenter.decode


def ctranslate2_engine(job: dict[str, Any]) -> tuple[Any, Any]:
    """CTranslate2 on the same pieces. torch is not imported, so the memory is CTranslate2's own."""
    import ctranslate2

    from nmt.translation.assets import TranslationAssets

    assets = TranslationAssets.of_model(Path(job["model"]))
    source, target = (assets.vocabulary(lang) for lang in (assets.source_lang, assets.target_lang))
    source_segmenter, target_segmenter = assets.make_segmenter(source), assets.make_segmenter(target)
    ids = {token: i for i, token in enumerate(target.tokens)}
    model = ctranslate2.Translator(
        job["exported"],
        compute_type=job["kind"],
        inter_threads=job["at_once"],
        intra_threads=job["threads"] // job["at_once"],
    )

    def translate(lines: list[str]) -> list[list[int]]:
        pieces = [[source.tokens[i] for i in line] for line in source_segmenter.encode(lines)]
        results = model.translate_batch(
            pieces,
            beam_size=job["beam"],
            length_penalty=1,
            max_decoding_length=job["max_length"],
            max_batch_size=4096,
            batch_type="tokens",
        )
        return [[ids[token] for token in result.hypotheses[0]] for result in results]

    return translate, target_segmenter.decode


def count(job: dict[str, Any]) -> dict[str, float]:
    """Count the multiply-adds that the translations need; see the floor above."""
    import torch

    from nmt.generation.options import DecodingOptions
    from nmt.translation.translator import Translator

    torch.set_num_threads(job["threads"])
    translator = Translator.load(job["model"])
    (model,) = translator.models
    beam = job["beam"]
    options = DecodingOptions(beam=beam, nbest=beam, max_len_a=0, max_len_b=job["max_length"])
    translations = list(translator.translate_lines(read(job), options))
    # A sentence leaves when its last hypothesis has ended: so many steps of K rows.
    rows = sum(beam * max(len(x.token_scores) for x in t.hypotheses) for t in translations if t.hypotheses)
    positions = sum(len(t.source_ids) + 1 for t in translations)

    def products(module: torch.nn.Module) -> int:
        return sum(x.weight.numel() for x in module.modules() if isinstance(x, torch.nn.Linear))

    memory = sum(x.cross_attention.kv_proj.weight.numel() for x in model.decoder.layers)
    per_row = products(model.decoder) - memory + model.output_weight.numel()
    per_position = products(model.encoder) + memory
    work = rows * per_row + positions * per_position
    return {"rows": rows, "per_row": per_row, "positions": positions, "flops": 2 * work}


def product_rate(job: dict[str, Any]) -> float:
    """Return the FLOP/s at which the products of a decoder step are made."""
    import torch

    from nmt.models.inference_parts import linear_map
    from nmt.translation.translator import Translator

    torch.set_num_threads(job["threads"])
    (model,) = Translator.load(job["model"]).models
    dtype = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    linears = [x.weight for x in model.decoder.layers.modules() if isinstance(x, torch.nn.Linear)]
    weights = [*linears, model.output_weight]
    with torch.inference_mode():
        maps = [linear_map(weight, None, dtype) for weight in weights]
        inputs = [torch.randn(ROWS, weight.size(1), dtype=dtype) for weight in weights]
        times = []
        for _ in range(20):
            before = time.perf_counter()
            for x, multiply in zip(inputs, maps, strict=True):
                multiply(x)
            times.append(time.perf_counter() - before)
    return 2 * ROWS * sum(weight.numel() for weight in weights) / statistics.median(times)


def report(
    beam: int,
    rounds: dict[str, list[dict[str, Any]]],
    counts: dict[str, float],
    rates: dict[str, float],
    args: argparse.Namespace,
) -> None:
    """Print a table; ratios are those of medians, to the first engine and to the fastest of CTranslate2."""

    def median(name: str, key: str) -> float:
        return statistics.median(found[key] for found in rounds[name])

    references = None if args.reference is None else read({"input": args.reference, "lines": args.lines})
    num_lines = len(next(iter(rounds.values()))[0]["texts"])
    print(f"\nbeam {beam}, {num_lines:,} lines, {args.threads} threads, medians of {args.rounds} rounds")
    print(
        "engine | sentences/s | tokens/s | CPU s | process s | first s | p50 ms | p95 ms | MB | "
        "same as first | BLEU"
    )
    engines = list(rounds)
    for name in engines:
        found = rounds[name][0]
        latencies = sorted(1000 * x for x in found["latencies"])
        p50, p95 = (latencies[int(len(latencies) * q)] if latencies else float("nan") for q in (0.5, 0.95))
        same = sum(a == b for a, b in zip(found["texts"], rounds[engines[0]][0]["texts"], strict=True))
        cells = [
            f"{num_lines / median(name, 'seconds'):.1f}",
            f"{found['tokens'] / median(name, 'seconds'):,.0f}",
            f"{median(name, 'cpu_seconds'):.2f}",
            f"{median(name, 'process'):.2f}",
            f"{median(name, 'first'):.2f}",
            f"{p50:.1f}",
            f"{p95:.1f}",
            f"{max(x['memory'] for x in rounds[name]) / 1e6:.0f}",
            f"{same:,}",
            bleu(found["texts"], references),
        ]
        print(" | ".join([name, *cells]))
    for name in engines:
        others = [x for x in engines if x != name and name.startswith("nmt")]
        ratios = [
            f"{median(x, 'seconds') / median(name, 'seconds'):.2f}x {x} "
            f"({median(x, 'cpu_seconds') / median(name, 'cpu_seconds'):.2f}x by CPU)"
            for x in others
        ]
        if ratios:
            print(f"{name} is as fast as " + ", ".join(ratios))
    for precision, rate in rates.items():
        print(
            f"floor {precision}: {counts['rows']:,.0f} rows of {counts['per_row'] / 1e6:.2f} M multiply-adds and "
            f"{counts['positions']:,} source positions = {counts['flops'] / 1e12:.3f} TFLOP, at "
            f"{rate / 1e9:.0f} GFLOP/s {counts['flops'] / rate:.2f} s, "
            f"{num_lines * rate / counts['flops']:.0f} sentences/s"
        )
    sys.stdout.flush()


def bleu(texts: list[str], references: list[str] | None) -> str:
    if references is None:
        return "-"
    from sacrebleu.metrics import BLEU

    return f"{BLEU().corpus_score(texts, [references]).score:.2f}"


if __name__ == "__main__":
    main()
