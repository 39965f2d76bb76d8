#!/usr/bin/env python
"""Measure how fast translations are found on one GPU, with random weights: no data and no model is needed.

    scripts/bench/gpu_decode.py [--peer huggingface] [--beam 5 1] [--precision bf16 fp32] [--plain] [--tiny]

The model is Transformer base (6+6 layers, 512/2048, 8 heads, one vocabulary of 10,000 types). All translations
have exactly 30 tokens: shorter ones are forbidden, and 30 is the limit. So the work is that of a trained model,
whatever the weights are. 1,000 sources have 8 to 24 pieces.

  sentences/s  median of the passes after one that is not timed, over all sentences, from ids to ids, in batches of
               the toolkit's own choice
  first pass   seconds: what is recorded is recorded in it
  ms/token     one sentence at a time, the median over some; 31 steps each with the end of sentence

Engines: nmt in each precision; with --plain also without recordings, as on a CPU; with --peer huggingface also
`MarianMTModel.generate` of transformers, of the same size, with 128 and 500 sentences at once, in each precision.
Times are read after the GPU has come to its end. --tiny runs all of it with a small model, on a CPU too.
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nmt.data.parallel_dataset import pad_right
from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.generation.static_search import StaticSearch
from nmt.models.inference import InferenceTransformer
from nmt.models.options import TransformerOptions
from nmt.models.transformer import Transformer
from nmt.translation.batch_runner import Batching, BatchRunner, free_memory

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """What is translated, by a model of which size."""

    device: torch.device
    sources: list[Any]  # ids, eos at the end
    length: int  # tokens of each translation
    vocabulary_size: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    num_passes: int
    num_alone: int  # sentences that are translated one at a time


@dataclass(frozen=True)
class Result:
    """What was measured of an engine."""

    engine: str
    beam: int
    precision: str
    first: float  # seconds
    seconds: float
    per_token: float | None  # seconds

    def cells(self, work: Work, ratio_to: float | None) -> list[str]:
        """Return a row of the table."""
        rate = len(work.sources) / self.seconds
        return [
            self.engine,
            str(self.beam),
            self.precision,
            f"{rate:,.0f}",
            f"{rate * work.length:,.0f}",
            "" if ratio_to is None else f"{rate / ratio_to:.2f}",
            f"{self.first:.2f}",
            "" if self.per_token is None else f"{1000 * self.per_token:.3f}",
        ]


def main() -> None:
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = make_work(device, tiny=args.tiny)
    print(machine(device, args.peer), flush=True)
    results = []
    for precision in args.precision:
        for beam in args.beam:
            results.append(measure_own(work, precision, beam, in_place=True))
            show(results[-1])
            if args.plain:
                results.append(measure_own(work, precision, beam, in_place=False))
                show(results[-1])
        if args.peer is not None:
            results += measure_huggingface(work, precision, args.beam, args.peer_batch)
    report(work, results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beam", nargs="+", type=int, default=[5, 1])
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"], choices=sorted(TYPES))
    parser.add_argument("--peer", choices=("huggingface",))
    parser.add_argument("--peer-batch", nargs="+", type=int, default=[128, 500], help="sentences at once")
    parser.add_argument("--plain", action="store_true", help="also measure the search that is not recorded")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model and few sentences, to try this script"
    )
    return parser.parse_args()


def make_work(device: torch.device, *, tiny: bool) -> Work:
    draw = random.Random(1)
    num_sentences, vocabulary_size = (12, 300) if tiny else (1000, 10_000)
    sources = [
        np.array([*(draw.randrange(UNK_ID + 1, vocabulary_size) for _ in range(draw.randint(8, 24))), EOS_ID])
        for _ in range(num_sentences)
    ]
    sizes = (64, 128, 4, 2) if tiny else (512, 2048, 8, 6)
    return Work(
        device,
        sources,
        length=8 if tiny else 30,
        vocabulary_size=vocabulary_size,
        dim=sizes[0],
        ffn_dim=sizes[1],
        num_heads=sizes[2],
        num_layers=sizes[3],
        num_passes=1 if tiny else 3,
        num_alone=2 if tiny else 20,
    )


def measure_own(work: Work, precision: str, beam: int, *, in_place: bool) -> Result:
    model = InferenceTransformer(make_model(work), TYPES[precision])
    static_search = StaticSearch([model]) if in_place else None
    options = DecodingOptions(beam=beam, min_len=work.length, max_len_a=0.0, max_len_b=work.length)
    generator = Generator(
        [model], options, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID, static_search=static_search
    )
    batching, free = Batching(), free_memory(work.device)
    if static_search is not None and free is not None:
        batching = batching.fill_in(num_bytes=free, bytes_of_piece=static_search.bytes_of_piece(beam))
    runner = BatchRunner(batching, beam_size=beam)
    lengths = np.array([[len(source)] for source in work.sources])

    def translate(indices: list[int]) -> list[list[int]]:
        source = torch.from_numpy(pad_right([work.sources[i] for i in indices])[0]).to(work.device)
        return [hypotheses[0].tokens for hypotheses in generator.generate(source)]

    def run_all() -> None:
        for _, translations in runner.run(lengths, lambda batch, _: translate(batch)):
            assert all(len(tokens) == work.length for tokens in translations)

    engine = "nmt" if in_place else "nmt, not recorded"
    return measure(work, engine, precision, beam, run_all, lambda i: translate([i]), steps=work.length + 1)


def make_model(work: Work) -> Transformer:
    torch.manual_seed(1)
    options = TransformerOptions(
        encoder_layers=work.num_layers,
        decoder_layers=work.num_layers,
        encoder_embed_dim=work.dim,
        decoder_embed_dim=work.dim,
        encoder_ffn_embed_dim=work.ffn_dim,
        decoder_ffn_embed_dim=work.ffn_dim,
        encoder_attention_heads=work.num_heads,
        decoder_attention_heads=work.num_heads,
        share_all_embeddings=True,
    )
    sizes = {"source_vocabulary_size": work.vocabulary_size, "target_vocabulary_size": work.vocabulary_size}
    return Transformer(options, **sizes, pad_id=PAD_ID).to(work.device).eval()


def measure(
    work: Work,
    engine: str,
    precision: str,
    beam: int,
    run_all: Callable[[], None],
    run_one: Callable[[int], object] | None,
    *,
    steps: int,
) -> Result:
    """Time a pass that is the first, then others, then sentences by themselves."""
    first = timed(work.device, run_all)
    seconds = statistics.median(timed(work.device, run_all) for _ in range(work.num_passes))
    per_token = None
    if run_one is not None:
        for i in range(4):  # what is recorded is recorded
            run_one(i % 2)
        alone = [timed(work.device, lambda i=i: run_one(i)) for i in range(work.num_alone)]
        per_token = statistics.median(alone) / steps
    return Result(engine, beam, precision, first, seconds, per_token)


def timed(device: torch.device, function: Callable[[], object]) -> float:
    synchronize(device)
    before = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - before


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_huggingface(work: Work, precision: str, beams: list[int], batch_sizes: list[int]) -> list[Result]:
    import transformers

    torch.manual_seed(1)
    pad_id, eos_id = PAD_ID, EOS_ID
    config = transformers.MarianConfig(
        vocab_size=work.vocabulary_size,
        d_model=work.dim,
        encoder_layers=work.num_layers,
        decoder_layers=work.num_layers,
        encoder_attention_heads=work.num_heads,
        decoder_attention_heads=work.num_heads,
        encoder_ffn_dim=work.ffn_dim,
        decoder_ffn_dim=work.ffn_dim,
        activation_function="relu",
        scale_embedding=True,
        pad_token_id=pad_id,
        eos_token_id=eos_id,
        decoder_start_token_id=pad_id,
        forced_eos_token_id=None,
        max_position_embeddings=256,
    )
    model = transformers.MarianMTModel(config).to(work.device, TYPES[precision]).eval()
    ranked = sorted(work.sources, key=len)
    results = []
    for beam in beams:

        def translate(sources: list[Any], beam: int = beam) -> None:
            ids = torch.from_numpy(pad_right(sources)[0]).to(work.device)
            found = model.generate(
                input_ids=ids,
                attention_mask=(ids != pad_id).long(),
                num_beams=beam,
                do_sample=False,
                min_new_tokens=work.length,
                max_new_tokens=work.length,
            )
            assert (
                found.tolist() and found.size(1) == work.length + 1
            )  # with the token that starts the decoder

        for size in batch_sizes:

            def run_all(size: int = size) -> None:
                for first in range(0, len(ranked), size):
                    translate(ranked[first : first + size])

            run_one = (lambda i: translate([work.sources[i]])) if size == batch_sizes[0] else None
            # Alone it takes so long that some sentences do.
            few = replace(work, num_alone=min(work.num_alone, 5))
            engine = f"transformers, {size} at once"
            results.append(measure(few, engine, precision, beam, run_all, run_one, steps=work.length))
            show(results[-1])
    return results


def machine(device: torch.device, peer: str | None) -> str:
    parts = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if peer is not None:
        import transformers

        parts.append(f"transformers {transformers.__version__}")
    return " | ".join(parts)


def show(result: Result) -> None:
    """Say at once what was found: a run that is cut off leaves that much."""
    alone = "" if result.per_token is None else f", {1000 * result.per_token:.3f} ms/token alone"
    print(
        f"{result.engine} {result.precision} beam {result.beam}: {result.seconds:.3f} s "
        f"(first {result.first:.2f}){alone}",
        flush=True,
    )


def report(work: Work, results: list[Result]) -> None:
    """Print a table; ratios are to the fastest of transformers with the same beam and precision."""
    print(f"\n{len(work.sources):,} sentences, {work.length} tokens each")
    print(
        "engine | beam | precision | sentences/s | tokens/s | ratio | first pass s | ms/token, one at a time"
    )
    for result in results:
        peers = [
            len(work.sources) / other.seconds
            for other in results
            if other.engine.startswith("transformers")
            and (other.beam, other.precision) == (result.beam, result.precision)
        ]
        print(" | ".join(result.cells(work, max(peers) if peers else None)))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
