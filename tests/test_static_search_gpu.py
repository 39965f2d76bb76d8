"""The search in place on a GPU: what is replayed is what the same steps find plainly, and what a CPU finds."""

from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
import torch
from support.random_transformer import VOCABULARY_SIZE, random_transformer

from nmt.data.parallel_dataset import pad_right
from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.generation import static_search as module
from nmt.generation.beam_search import Hypothesis
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.generation.static_search import StaticSearch
from nmt.models.inference import InferenceTransformer
from nmt.models.options import TransformerOptions
from nmt.models.transformer import Transformer
from nmt.translation.batch_runner import Batching, BatchRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IDS = {"pad_id": PAD_ID, "eos_id": EOS_ID, "unk_id": UNK_ID}
OPTIONS = [
    DecodingOptions(beam=1, max_len_b=20),
    DecodingOptions(beam=5, nbest=5, max_len_b=20),
    DecodingOptions(
        beam=3, lenpen=0.6, min_len=3, no_repeat_ngram_size=2, repetition_penalty=1.2, unkpen=0.5
    ),
    DecodingOptions(beam=3, sampling=True, nbest=3),
    DecodingOptions(beam=2, sampling=True, sampling_topk=5),
    DecodingOptions(beam=2, sampling=True, sampling_topp=0.8),
]


def sentences(number: int, longest: int = 9) -> list[list[int]]:
    random = Random(number)
    return [
        random.choices(range(UNK_ID, VOCABULARY_SIZE), k=random.randint(1, longest)) for _ in range(number)
    ]


def translate(
    generator: Generator, some: list[list[int]], device: str, prefixes: list[list[int]] | None = None
) -> list[list[Hypothesis]]:
    source = torch.from_numpy(pad_right([np.array([*x, EOS_ID]) for x in some])[0])
    starts = None if prefixes is None else torch.from_numpy(pad_right([np.array(x) for x in prefixes])[0])
    return generator.generate(source.to(device), None if starts is None else starts.to(device))


def assert_same(found: list[list[Hypothesis]], expected: list[list[Hypothesis]], tolerance: float) -> None:
    assert [[x.tokens for x in nbest] for nbest in found] == [[x.tokens for x in nbest] for nbest in expected]
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.score == pytest.approx(b.score, abs=tolerance)
            assert a.token_scores == pytest.approx(b.token_scores, abs=tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_prefixes", [False, True])
def test_what_is_replayed_is_what_a_cpu_finds(options: DecodingOptions, with_prefixes: bool) -> None:
    # float64, in which nothing ties: the third and later passes are replayed from the first step on.
    some = sentences(40)
    prefixes = None
    if with_prefixes:
        prefixes = [x[: i % 4] + [EOS_ID] * (i % 7 == 0) or [UNK_ID] for i, x in enumerate(some)]
    on_cpu = Generator([InferenceTransformer(random_transformer(5, torch.float64))], options, **IDS)
    fast = [InferenceTransformer(random_transformer(5, torch.float64).cuda())]
    on_gpu = Generator(fast, options, **IDS, static_search=StaticSearch(fast))
    expected = translate(on_cpu, some, "cpu", prefixes)
    for _ in range(4):
        assert_same(translate(on_gpu, some, "cuda", prefixes), expected, 1e-9)


def test_other_batches_of_the_same_sizes_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tables that are outgrown, and left for smaller ones; recordings of all of them share memory.
    monkeypatch.setattr(module, "_STEPS", (4, 8, 16, 32))
    monkeypatch.setattr(module, "_KEPT_SHARE", 1)
    monkeypatch.setattr(module, "_FEWEST_ROWS", 0)
    options = DecodingOptions(beam=4, nbest=4, max_len_a=1.5, max_len_b=6)
    on_cpu = Generator([InferenceTransformer(random_transformer(2, torch.float64))], options, **IDS)
    fast = [InferenceTransformer(random_transformer(2, torch.float64).cuda())]
    on_gpu = Generator(fast, options, **IDS, static_search=StaticSearch(fast))
    for number in (60, 61, 62, 17, 1, 60, 2, 1, 63, 1):
        some = sentences(number)
        assert_same(translate(on_gpu, some, "cuda"), translate(on_cpu, some, "cpu"), 1e-9)


@pytest.mark.parametrize("beam", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recorded_equals_plain(dtype: torch.dtype, beam: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same kernels: the same bits.
    fast = [InferenceTransformer(base_model(num_layers=2), dtype)]
    options = DecodingOptions(beam=beam, nbest=beam, max_len_a=0.0, max_len_b=20)
    some = sentences(50)
    recorded = Generator(fast, options, **IDS, static_search=StaticSearch(fast))
    found = [translate(recorded, some, "cuda") for _ in range(4)]
    monkeypatch.setattr("nmt.system.cuda_graphs._NUM_PLAIN_CALLS", 10**9)
    plain = Generator(fast, options, **IDS, static_search=StaticSearch(fast))
    expected = translate(plain, some, "cuda")
    for results in found:
        assert_same(results, expected, 0.0)


def test_float32_on_a_gpu_equals_a_cpu_but_for_ties() -> None:
    options = DecodingOptions(beam=5, max_len_a=0.0, max_len_b=20)
    some = sentences(100)
    on_cpu = Generator([InferenceTransformer(base_model(num_layers=2).cpu())], options, **IDS)
    fast = [InferenceTransformer(base_model(num_layers=2))]
    on_gpu = Generator(fast, options, **IDS, static_search=StaticSearch(fast))
    found, expected = translate(on_gpu, some, "cuda"), translate(on_cpu, some, "cpu")
    differing = sum(x[0].tokens != y[0].tokens for x, y in zip(found, expected, strict=True))
    assert differing <= 2


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Leave the process 500 MB more than it has."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 500 * 2**20) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_out_of_memory_in_a_search_halves_the_batch(little_memory: None) -> None:
    # Tables of 512 sentences would take 640 MB.
    fast = [InferenceTransformer(base_model(num_layers=4))]
    options = DecodingOptions(beam=5, max_len_a=0.0, max_len_b=31)
    generator = Generator(fast, options, **IDS, static_search=StaticSearch(fast))
    some = sentences(512)
    runner = BatchRunner(Batching(max_tokens=10**6), beam_size=5)
    lengths = np.array([[len(x) + 1] for x in some])
    found: dict[int, list[Hypothesis]] = {}
    for places, results in runner.run(
        lengths, lambda batch, _: translate(generator, [some[i] for i in batch], "cuda")
    ):
        found.update(zip(places, results, strict=True))
    assert runner.num_halved > 0
    expected = translate(generator, some[:64], "cuda")
    differing = sum(found[i][0].tokens != expected[i][0].tokens for i in range(64))
    assert differing <= 2  # ties of float32


def base_model(num_layers: int) -> Transformer:
    torch.manual_seed(3)
    options = TransformerOptions(
        encoder_layers=num_layers,
        decoder_layers=num_layers,
        encoder_embed_dim=256,
        decoder_embed_dim=256,
        encoder_ffn_embed_dim=512,
        decoder_ffn_embed_dim=512,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    sizes = {"source_vocabulary_size": VOCABULARY_SIZE, "target_vocabulary_size": 1000}
    model = Transformer(options, **sizes, pad_id=PAD_ID)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return model.cuda().eval()
