#!/usr/bin/env python
"""Measure how fast updates are made, and how much of the machine's matrix products they reach.

    scripts/bench/train.py [DATA] [--precision fp32 bf16] [options of nmt-train, such as --max-tokens 8192]

DATA is a data directory of nmt-preprocess; without one, a corpus of random words is generated (its loss means
nothing, its lengths are those of image captions). What is timed is the toolkit's own path: data directory ->
BatchIterator -> Trainer.train_step. The model is 256/1024 wide with 4 heads and 3+3 layers unless options of
nmt-train say otherwise.

Each precision runs in a process of its own, so that its memory is its own, and they take turns, so that a
machine that becomes slower becomes slower for all. A turn measures the rate of 2048 x 2048 x 2048 products in the
same type too. "of GEMM" is the share of that rate that the update reaches, counting the products that a batch
without padding needs; it can exceed 100%, since PyTorch's own products in float32 are not the fastest there are.
"""

import argparse
import multiprocessing as mp
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

REFERENCE_JOB = {
    **{"--encoder-layers": "3", "--decoder-layers": "3"},
    **{"--encoder-embed-dim": "256", "--decoder-embed-dim": "256"},
    **{"--encoder-ffn-embed-dim": "1024", "--decoder-ffn-embed-dim": "1024"},
    **{"--encoder-attention-heads": "4", "--decoder-attention-heads": "4"},
    **{"--max-tokens": "4096", "--dropout": "0.1"},
}
GEMM_SIZE = 2048


class Turn(NamedTuple):
    """What one turn of a worker measured."""

    seconds: float
    updates: int
    target_tokens: int
    flops: float
    """Floating-point operations of the products that the batches need, their padding left out."""
    gemm_rate: float
    loss: float
    """Of the last update."""
    peak_memory: int
    """In bytes: of the process, or of the GPU."""


def main() -> None:
    args, train_flags = parse_arguments()
    with TemporaryDirectory() as folder:
        data = args.data or generate_data(Path(folder))
        given = {flag.split("=")[0] for flag in train_flags}
        job = [x for flag, value in REFERENCE_JOB.items() if flag not in given for x in (flag, value)]
        flags = [str(data), "--save-dir", str(Path(folder) / "run"), "--no-eval-bleu", *job, *train_flags]
        if not given & {"--share-all-embeddings", "--no-share-all-embeddings"}:
            flags.append("--share-all-embeddings")
        workers = {name: Worker(flags, name, args) for name in args.precision}
        # All have started before the first is timed.
        for name, worker in workers.items():
            print(f"{name}: {worker.receive()}", flush=True)
        turns: dict[str, list[Turn]] = {name: [] for name in workers}
        for _ in range(args.rounds):
            for name, worker in workers.items():
                turns[name].append(worker.take_turn())
        for worker in workers.values():
            worker.close()
    report(turns)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=("fp32", "bf16", "fp16", "auto"))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each precision")
    parser.add_argument("--updates", type=int, default=8, help="updates in a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of a worker on a CPU")
    parser.add_argument("--profile", action="store_true", help="print what one more turn spends its time on")
    parser.add_argument(
        "--check-flops", action="store_true", help="compare the count with that of the operations that run"
    )
    # By hand: argparse would take the value of an option that it does not know for the data.
    has_data = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    args, train_flags = parser.parse_known_args(sys.argv[1 + has_data :])
    args.data = Path(sys.argv[1]) if has_data else None
    return args, train_flags


def generate_data(folder: Path) -> Path:
    """Make a data directory of 20,000 pairs of random words, 3 to 40 of them, 14 on average."""
    from nmt.data.options import PreprocessOptions
    from nmt.data.preprocess import preprocess

    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(12_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    for split, size in (("train", 20_000), ("valid", 200)):
        lengths = [min(max(round(rng.lognormvariate(2.5, 0.35)), 3), 40) for _ in range(size)]
        lines = [rng.choices(words, weights, k=length) for length in lengths]
        for language, step in (("xx", 1), ("yy", -1)):
            text = "".join(" ".join(line[::step]) + "\n" for line in lines)
            (folder / f"{split}.{language}").write_text(text)
    options = PreprocessOptions(
        source_lang="xx",
        target_lang="yy",
        destdir=folder / "data",
        trainpref=str(folder / "train"),
        validpref=str(folder / "valid"),
    )
    preprocess(options, log=lambda line: print(line, file=sys.stderr))
    return options.destdir


class Worker:
    """A process that trains in one precision when it is asked to."""

    def __init__(self, flags: Sequence[str], precision: str, args: argparse.Namespace) -> None:
        context = mp.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, flags, precision, args), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            sys.exit("a worker has died; see above")

    def take_turn(self) -> Turn:
        self.connection.send("go")
        return self.receive()

    def close(self) -> None:
        self.connection.send("end")
        self.process.join()


def serve(connection: Connection, flags: Sequence[str], precision: str, args: argparse.Namespace) -> None:
    """Set up, then take a turn whenever the other end asks."""
    import torch

    from nmt.config.mapping import parse_command
    from nmt.distributed import join_world
    from nmt.options import TrainConfig
    from nmt.translation.options import TranslationOptions

    torch.set_num_threads(args.threads)
    all_flags = [*flags, "--precision", precision]
    config = parse_command(TrainConfig[TranslationOptions], all_flags, prog="train.py", description="")
    with join_world(config.device) as world:
        job = Job(config, world, updates=args.updates)
        job.take_turn()  # caches, and the memory of the allocator
        connection.send(job.describe())
        while connection.recv() == "go":
            connection.send(job.take_turn())
        if args.check_flops:
            print(f"{precision}: {job.check_flops()}", flush=True)
        if args.profile:
            print(f"{precision}:\n{job.profile()}", flush=True)


class Job:
    """A trainer and its batches, made as nmt-train makes them."""

    def __init__(self, config: Any, world: Any, *, updates: int) -> None:
        import torch

        from nmt.data.batch_iterator import BatchIterator
        from nmt.trainer import Trainer
        from nmt.update.compilation import compile_model

        self.device = world.device
        self.model_options = config.task_options.model
        self.updates = updates
        task = config.task_options.build(None)
        self.num_types = len(task.target_vocabulary)
        batching = replace(config.batching, num_workers=0)
        self.batches = BatchIterator(task.open_split("train"), batching, seed=config.seed)
        self.iterator = iter(self.batches)
        torch.manual_seed(config.seed)
        model = task.build_model()
        if config.optimization.compile:
            compile_model(model, has_one_shape=False)
        self.trainer = Trainer(
            task,
            model,
            config.optimization,
            world=world,
            seed=config.seed,
            updates_per_epoch=self.batches.updates_per_epoch,
        )

    def describe(self) -> str:
        size = sum(parameter.numel() for parameter in self.trainer.model.parameters())
        return f"{size:,} parameters, {self.num_types:,} types, {self.device}"

    def take_turn(self) -> Turn:
        import torch

        updates = [self._next() for _ in range(self.updates)]  # collated before the clock starts
        gemm_rate = measure_gemm(self.device, self.trainer.precision.dtype)
        self._synchronize()
        start = time.perf_counter()
        with self.trainer.metrics.scope("train"):
            for micro_batches in updates:
                self.trainer.train_step(micro_batches)
        self._synchronize()
        seconds = time.perf_counter() - start
        sums = self.trainer.metrics.sums("train", self.trainer.world)
        self.trainer.metrics.reset("train")
        batches = [micro_batch.batch for micro_batches in updates for micro_batch in micro_batches]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Turn(
            seconds=seconds,
            updates=len(updates),
            target_tokens=sum(batch.num_targets for batch in batches),
            flops=sum(self._count_flops(batch, padded=False) for batch in batches),
            gemm_rate=gemm_rate,
            loss=sums["loss"] / sums["num_targets"],
            peak_memory=torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak,
        )

    def check_flops(self) -> str:
        """Count an update's products once more as they are made, with the padding."""
        from nmt.run.flops import FlopCounter

        micro_batches = self._next()
        with FlopCounter() as counter:
            self.trainer.train_step(micro_batches)
        ours = sum(self._count_flops(micro_batch.batch, padded=True) for micro_batch in micro_batches)
        return f"{ours:.4e} FLOPs with padding by our count, {counter.total:.4e} by PyTorch's formulas"

    def profile(self) -> str:
        """Take one more turn and say what it spends its time on."""
        import torch

        with torch.profiler.profile(acc_events=True) as profiler:
            self.take_turn()
        order = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table: str = profiler.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=60)
        return table

    def _next(self) -> list[Any]:
        while (micro_batches := next(self.iterator, None)) is None:
            self.iterator = iter(self.batches)
        return micro_batches

    def _count_flops(self, batch: Any, *, padded: bool) -> float:
        shapes = sentence_lengths(batch, padded=padded)
        num_targets = batch.num_targets  # padding never reaches the projection to the vocabulary
        return count_flops(shapes, num_targets, self.model_options, vocabulary_size=self.num_types)

    def _synchronize(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


def sentence_lengths(batch: Any, *, padded: bool) -> Iterator[tuple[int, int]]:
    """Yield source and target length of each pair, its own or that of the tensors it lies in."""
    from nmt.data.vocabulary import PAD_ID

    if padded:
        return iter([(batch.source.size(1), batch.target.size(1))] * batch.source.size(0))
    lengths = ((side != PAD_ID).sum(dim=1).tolist() for side in (batch.source, batch.target))
    return zip(*lengths, strict=True)


def count_flops(
    pairs: Iterator[tuple[int, int]], num_targets: int, options: Any, *, vocabulary_size: int
) -> float:
    """Count the floating-point operations of all products of forward and backward pass, two a multiply-add.

    The backward pass has two products for each of the forward pass. Half of the decoder's self-attention is
    masked, but computed, and counted.
    """
    enc, dec = options.encoder_embed_dim, options.decoder_embed_dim
    encoder_token = options.encoder_layers * (4 * enc * enc + 2 * enc * options.encoder_ffn_embed_dim)
    encoder_token += options.decoder_layers * 2 * enc * dec  # keys and values for the decoder
    decoder_token = options.decoder_layers * (6 * dec * dec + 2 * dec * options.decoder_ffn_embed_dim)
    total = num_targets * dec * vocabulary_size
    for source, target in pairs:
        total += source * encoder_token + target * decoder_token
        total += options.encoder_layers * 2 * source * source * enc
        total += options.decoder_layers * 2 * (target * target + target * source) * dec
    return 3.0 * 2.0 * total


def measure_gemm(device: Any, dtype: Any, seconds: float = 0.3) -> float:
    """Return the floating-point operations a second of PyTorch's square products."""
    import torch

    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype) for _ in range(2))
    out = torch.mm(a, b)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or count < 3:
        for _ in range(50 if device.type == "cuda" else 1):
            torch.mm(a, b, out=out)
            count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return count * 2.0 * GEMM_SIZE**3 / (time.perf_counter() - start)


def report(turns: dict[str, list[Turn]]) -> None:
    """Print a table: medians over the turns, and the first precision's rate as the unit of the ratios."""
    print(
        "precision  target tok/s (min - max)   updates/s  MFLOP/tok  GEMM GFLOP/s  of GEMM  peak MB   ratio  loss"
    )
    first = None
    for name, list_ in turns.items():
        rates = [turn.target_tokens / turn.seconds for turn in list_]
        rate = statistics.median(rates)
        updates = statistics.median(turn.updates / turn.seconds for turn in list_)
        flops = sum(turn.flops for turn in list_) / sum(turn.target_tokens for turn in list_)
        gemm = statistics.median(turn.gemm_rate for turn in list_)
        share = statistics.median(turn.flops / turn.seconds / turn.gemm_rate for turn in list_)
        first = first or rates
        # Turn by turn, so that what slows both down cancels out.
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates, first, strict=True))
        print(
            f"{name:9}  {rate:8,.0f} ({min(rates):,.0f} - {max(rates):,.0f})".ljust(38)
            + f"{updates:9.2f}  {flops / 1e6:9.1f}  {gemm / 1e9:12.0f}  {share:7.0%}"
            + f"  {list_[-1].peak_memory / 2**20:7.0f}  {ratio:6.2f}  {list_[-1].loss:.3f}"
        )


if __name__ == "__main__":
    main()
