#!/usr/bin/env python
"""Measure updates on a GPU: packed and recorded, as `nmt-train` makes them there, beside peers.

    scripts/bench/gpu_train.py [--sizes tiny base big] [--precision bf16 fp32 fp16] [--compile] [--padded]
                               [--peer huggingface] [--without-layer-kernels] [--profile] [--quick]

Sentences are random ids of the lengths that captions have (14 tokens on average), 8,000 types on both sides.
Batches are read by two worker processes, as by default on a GPU; the clock runs over reading, copying and update.
"of prod." is the share of the rate of square products (8192 each way, same type) that the products of the update
reach, padding not counted. Peers are trained on padded batches of the same pairs and size; the first pass over
their shapes is timed apart. Needs no package that nmt does not, but the peer.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from train import count_flops, measure_gemm

from nmt.data.batch_iterator import BatchIterator, MicroBatch
from nmt.data.options import BatchingOptions
from nmt.data.packing import PackedDataset, PackedShape, PackedTranslationBatch, packed_limits
from nmt.data.parallel_dataset import ParallelDataset
from nmt.data.vocabulary import EOS_ID, PAD_ID
from nmt.distributed import World, join_world
from nmt.models import packed_layers
from nmt.models.architectures import ARCHITECTURES
from nmt.models.options import TransformerOptions
from nmt.models.transformer import Transformer
from nmt.options import OptimizationOptions
from nmt.task import LossOutput
from nmt.trainer import Trainer
from nmt.translation.loss import packed_translation_loss, translation_loss

NUM_TYPES = 8000
# name: (architecture, max_tokens)
SIZES = {
    "tiny": ("transformer_tiny", 2048),
    "base": ("transformer", 16384),
    "big": ("transformer_vaswani_wmt_en_de_big", 32768),
}


class RandomSentences:
    """Random ids in one flat array, which pickles quickly."""

    def __init__(self, num_sentences: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        # Lengths of one side follow those of the other, as in translation.
        shared = np.random.default_rng(1).normal(2.55, 0.32, num_sentences)
        lengths = np.exp(shared + random.normal(0, 0.12, num_sentences)).round().astype(np.int64).clip(3, 60)
        self.ends = lengths.cumsum()
        self.sizes = lengths.astype(np.int32)
        self.ids = random.integers(4, NUM_TYPES, size=int(self.ends[-1])).astype(np.uint16)
        self.ids[self.ends - 1] = EOS_ID

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Any:
        end = int(self.ends[index])
        return self.ids[end - int(self.sizes[index]) : end].astype(np.int64)


class LossTask:
    """The translation loss, without what a run needs besides."""

    metrics: ClassVar = {"loss": "min"}

    def compute_loss(self, model: Any, batch: Any) -> LossOutput:
        compute = packed_translation_loss if isinstance(batch, PackedTranslationBatch) else translation_loss
        return compute(model, batch, label_smoothing=0.1)  # type: ignore[operator]


@dataclass
class Measured:
    """What one row of the table says."""

    name: str
    target_rate: float
    updates: float
    flop_rate: float
    gemm_rate: float
    memory: int
    start: float
    losses: list[float]

    def __str__(self) -> str:
        share = f"{self.flop_rate / self.gemm_rate:7.0%}" if self.gemm_rate else "      -"
        losses = " ".join(f"{loss:.3f}" for loss in self.losses)
        return (
            f"{self.name:34} {self.target_rate:11,.0f} {self.updates:8.1f} {self.flop_rate / 1e12:8.0f} {share} "
            f"{self.memory / 2**20:8,.0f} {self.start:6.1f}   {losses}"
        )


HEADER = f"{'':34} target tok/s  upd/s  TFLOP/s of prod.     MiB  first s   loss along the way"


def main() -> None:
    args = parse_arguments()
    with join_world("auto") as world:
        name = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}", flush=True)
        pairs = ParallelDataset(RandomSentences(args.pairs, 2), RandomSentences(args.pairs, 3))
        print(HEADER, flush=True)
        for size in args.sizes:
            architecture, max_tokens = SIZES[size]
            options = replace(
                TransformerOptions(**ARCHITECTURES[architecture]),  # type: ignore[arg-type]
                share_all_embeddings=True,
                **({"encoder_layers": 1, "decoder_layers": 1} if args.quick else {}),
            )
            max_tokens = 256 if args.quick else max_tokens
            for precision in args.precision:
                for way in ways(args, precision):
                    print(ours(size, options, max_tokens, precision, pairs, world, args, way), flush=True)
            if args.peer:
                print(huggingface(size, options, max_tokens, pairs, world, args), flush=True)


@dataclass(frozen=True)
class Way:
    """How the toolkit trains."""

    is_packed: bool = True
    has_layer_kernels: bool = True

    def __str__(self) -> str:
        return ("packed" if self.is_packed else "padded") + (
            "" if self.has_layer_kernels else ", torch's layers"
        )


def ways(args: argparse.Namespace, precision: str) -> list[Way]:
    has_kernels = precision != "fp32" and not args.compile
    others = [Way(has_layer_kernels=False)] if args.without_layer_kernels and has_kernels else []
    return [Way(), *others, *([Way(is_packed=False)] if args.padded else [])]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument(
        "--precision", nargs="*", default=["bf16", "fp32", "fp16"], choices=("fp32", "bf16", "fp16")
    )
    parser.add_argument("--updates", type=int, default=60, help="that are timed")
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--padded", action="store_true", help="the padded path, too")
    parser.add_argument(
        "--without-layer-kernels",
        action="store_true",
        help="once more, with PyTorch's operators for dropout, residual connections, norms, ReLU and biases",
    )
    parser.add_argument("--peer", choices=["huggingface"])
    parser.add_argument("--profile", action="store_true", help="what the GPU spends its time on")
    parser.add_argument("--quick", action="store_true", help="one layer and small batches, to try the script")
    return parser.parse_args()


def ours(
    size: str,
    options: TransformerOptions,
    max_tokens: int,
    precision: str,
    pairs: ParallelDataset,
    world: World,
    args: argparse.Namespace,
    way: Way,
) -> Measured:
    """Train with the toolkit's own iterator and trainer."""
    is_packed = way.is_packed
    batching = BatchingOptions(max_tokens=max_tokens)
    is_gpu = world.device.type == "cuda"
    start = time.perf_counter()
    examples: Any = pairs
    limits = None
    if is_packed:
        limits = packed_limits(batching, pairs.sizes)
        assert limits.max_sentences is not None
        longest = max(pairs.longest)
        shape = PackedShape.of(max_tokens=max_tokens, max_sentences=limits.max_sentences, longest=longest)
        examples = PackedDataset(pairs, shape)
    torch.manual_seed(1)
    model = Transformer(
        options, source_vocabulary_size=NUM_TYPES, target_vocabulary_size=NUM_TYPES, pad_id=PAD_ID
    )
    optimization = OptimizationOptions(
        precision=precision,  # type: ignore[arg-type]
        warmup_updates=400,
        clip_norm=1.0,
        compile=args.compile and is_packed,
    )
    torch.cuda.reset_peak_memory_stats() if is_gpu else None
    trainer = Trainer(
        LossTask(),  # type: ignore[arg-type]
        model,
        optimization,
        world=world,
        seed=1,
        updates_per_epoch=1,
        has_one_shape=is_packed,
    )
    batches = BatchIterator(
        examples,
        batching,
        seed=1,
        num_workers=2 if is_gpu else 0,
        pin_memory=is_gpu,
        limits=limits,
    )
    losses: list[float] = []
    with batches, layer_kernels(way.has_layer_kernels):
        updates = forever(batches)
        train(trainer, updates, 1, losses)
        first_seconds = time.perf_counter() - start
        train(trainer, updates, 40, losses)
        seconds, num_targets, done = train(trainer, updates, args.updates, losses)
        if args.profile:
            profile(trainer, updates)
        flops = flops_of(done, pairs, options)
    dtype = trainer.precision.dtype
    trainer.close()
    memory = torch.cuda.max_memory_reserved() if is_gpu else 0
    del trainer, model
    if is_gpu:
        torch.cuda.empty_cache()
    compiled = " compiled" if args.compile and is_packed else ""
    return Measured(
        f"nmt {size} {precision} {max_tokens:,} {way}{compiled}",
        num_targets / seconds,
        args.updates / seconds,
        flops / seconds,
        square_products(world.device, dtype),
        memory,
        first_seconds,
        losses,
    )


@contextmanager
def layer_kernels(are_wanted: bool) -> Iterator[None]:
    """Leave the kernels of layers out, but for attention, if they are not wanted."""
    have_kernels = packed_layers.have_kernels
    if not are_wanted:
        packed_layers.have_kernels = lambda *_: False  # type: ignore[assignment]
    try:
        yield
    finally:
        packed_layers.have_kernels = have_kernels


def forever(batches: BatchIterator) -> Iterator[list[MicroBatch]]:
    while True:
        yield from batches


def train(
    trainer: Trainer, updates: Iterator[list[MicroBatch]], count: int, losses: list[float]
) -> tuple[float, int, list[MicroBatch]]:
    """Make updates; return seconds, target tokens and the batches."""
    synchronize(trainer.world.device)
    start, done = time.perf_counter(), []
    with trainer.metrics.scope("train"):
        for _ in range(count):
            micro_batches = next(updates)
            trainer.train_step(micro_batches)
            done += [batch._replace(batch=batch.batch.num_targets) for batch in micro_batches]
    sums = trainer.metrics.sums("train", trainer.world)  # waits for the device
    seconds = time.perf_counter() - start
    trainer.metrics.reset("train")
    losses.append(sums["loss"] / max(sums["num_targets"], 1))
    return seconds, sum(batch.batch for batch in done), done


def flops_of(done: list[MicroBatch], pairs: ParallelDataset, options: TransformerOptions) -> float:
    sizes = np.concatenate([pairs.sizes[list(batch.indices)] for batch in done])
    lengths = ((int(source), int(target)) for source, target in sizes)
    return count_flops(lengths, int(sizes[:, 1].sum()), options, vocabulary_size=NUM_TYPES)


def profile(trainer: Trainer, updates: Iterator[list[MicroBatch]]) -> None:
    ready = [next(updates) for _ in range(5)]
    with torch.profiler.profile(acc_events=True) as profiler:
        for micro_batches in ready:
            trainer.train_step(micro_batches)
        synchronize(trainer.world.device)
    averages = profiler.key_averages()
    print(averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))


def huggingface(
    size: str,
    options: TransformerOptions,
    max_tokens: int,
    pairs: ParallelDataset,
    world: World,
    args: argparse.Namespace,
) -> Measured:
    """Train transformers' Marian of the same size by a plain loop: autocast, SDPA, fused AdamW, clipping."""
    from transformers import MarianConfig, MarianMTModel

    torch.backends.cuda.enable_cudnn_sdp(True)  # as a user of transformers has it
    config = MarianConfig(
        vocab_size=NUM_TYPES,
        d_model=options.encoder_embed_dim,
        encoder_layers=options.encoder_layers,
        decoder_layers=options.decoder_layers,
        encoder_ffn_dim=options.encoder_ffn_embed_dim,
        decoder_ffn_dim=options.decoder_ffn_embed_dim,
        encoder_attention_heads=options.encoder_attention_heads,
        decoder_attention_heads=options.decoder_attention_heads,
        dropout=options.dropout,
        activation_function="relu",
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        decoder_start_token_id=EOS_ID,
        attn_implementation="sdpa",
    )
    start = time.perf_counter()
    torch.manual_seed(1)
    model = MarianMTModel(config).to(world.device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-4, betas=(0.9, 0.98), fused=world.device.type == "cuda"
    )
    batches = BatchIterator(pairs, BatchingOptions(max_tokens=max_tokens), seed=1)
    updates = forever(batches)
    ready = [next(updates)[0].batch.to(world.device) for _ in range(16)]
    losses: list[float] = []

    def update(batch: Any) -> None:
        with torch.autocast(world.device.type, torch.bfloat16):
            logits = model(
                input_ids=batch.source,
                attention_mask=batch.source != PAD_ID,
                decoder_input_ids=batch.target_input,
                use_cache=False,
            ).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.target.flatten(), ignore_index=PAD_ID, label_smoothing=0.1
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    update(ready[0])
    synchronize(world.device)
    first_seconds = time.perf_counter() - start
    start = time.perf_counter()
    for batch in ready:
        update(batch)
    synchronize(world.device)
    first_pass = sum(batch.num_targets for batch in ready) / (time.perf_counter() - start)
    start, passes = time.perf_counter(), 3
    for _ in range(passes):
        for batch in ready:
            update(batch)
    synchronize(world.device)
    seconds = time.perf_counter() - start
    torch.backends.cuda.enable_cudnn_sdp(False)
    num_targets = passes * sum(batch.num_targets for batch in ready)
    memory = torch.cuda.max_memory_reserved() if world.device.type == "cuda" else 0
    return Measured(
        f"HF {size} bf16 {max_tokens:,} (1st pass {first_pass:,.0f})",
        num_targets / seconds,
        passes * len(ready) / seconds,
        0.0,
        0.0,
        memory,
        first_seconds,
        losses,
    )


def square_products(device: Any, dtype: Any) -> float:
    """Return the rate of square products, 8192 each way on a GPU."""
    if device.type != "cuda":
        return measure_gemm(device, dtype)
    a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        torch.mm(a, b)
    torch.cuda.synchronize()
    return 10 * 2.0 * 8192**3 / (time.perf_counter() - start)


def synchronize(device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # at once, whatever processes read batches
