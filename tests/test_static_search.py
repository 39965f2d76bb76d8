"""The search in place, whose steps a GPU replays, run plainly: it equals the other search, and asks nothing."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_transformer import VOCABULARY_SIZE, random_transformer
from support.tiny_translation_model import WORDS, write_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.generation import roster
from nmt.generation import static_search as module
from nmt.generation.beam_search import Hypothesis
from nmt.generation.choice import Settings
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.generation.rules import TokenIds
from nmt.generation.static_search import StaticSearch
from nmt.generation.static_step import SearchTables, make_tables, run_step, start_
from nmt.models.inference import InferenceTransformer
from nmt.models.options import TransformerOptions
from nmt.models.reserve import Reserve
from nmt.models.static_decoder import Sizes, StaticDecoder
from nmt.models.transformer import Transformer
from nmt.translation.batch_runner import Batching
from nmt.translation.translator import Translator

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCES = st.lists(
    st.lists(st.integers(UNK_ID, VOCABULARY_SIZE - 1), min_size=1, max_size=9), min_size=1, max_size=7
)


@st.composite
def decoding_options(draw: st.DrawFn, num_models: int) -> DecodingOptions:
    beam = draw(st.integers(1, 5))
    is_drawn = draw(st.integers(0, 3)) == 0
    restriction: dict[str, Any] = {}
    if is_drawn:
        restriction = draw(st.sampled_from(({}, {"sampling_topk": 3}, {"sampling_topp": 0.7}, {"seed": 5})))
    if num_models > 1:
        restriction["ensemble_by"] = draw(st.sampled_from(("probabilities", "log-probabilities")))
    unnormalized = draw(st.booleans())
    return DecodingOptions(
        beam=beam,
        nbest=draw(st.integers(1, beam)),
        lenpen=1.0 if unnormalized else draw(st.sampled_from((0.0, 0.6, 1.0, 1.7))),
        unnormalized=unnormalized,
        min_len=draw(st.sampled_from((0, 1, 4))),
        max_len_a=draw(st.sampled_from((0.0, 1.0, 2.5))),
        max_len_b=draw(st.sampled_from((0, 1, 4, 9))),
        unkpen=draw(st.sampled_from((0.0, 0.5, -0.5))),
        temperature=draw(st.sampled_from((1.0, 0.5, 2.0))),
        no_repeat_ngram_size=draw(st.integers(0, 3)),
        repetition_penalty=draw(st.sampled_from((1.0, 1.3, 0.8))),
        sampling=is_drawn,
        **restriction,
    )


@st.composite
def forced_prefixes(draw: st.DrawFn, num_sentences: int) -> torch.Tensor | None:
    if draw(st.booleans()):
        return None
    words = st.lists(st.integers(UNK_ID, VOCABULARY_SIZE - 1), max_size=7)
    rows = draw(st.lists(words, min_size=num_sentences, max_size=num_sentences))
    whole = draw(st.lists(st.booleans(), min_size=num_sentences, max_size=num_sentences))
    rows = [[*row, EOS_ID] if is_whole else row for row, is_whole in zip(rows, whole, strict=True)]
    return padded(rows)


def padded(rows: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows], dtype=torch.int64)


def sources(sentences: list[list[int]]) -> torch.Tensor:
    return padded([[*sentence, EOS_ID] for sentence in sentences])


def noisy_transformer(seed: int) -> Transformer:
    """Make an untrained model none of whose biases is 0."""
    model = random_transformer(seed, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def generators(seeds: list[int], options: DecodingOptions) -> tuple[Generator, Generator]:
    """Make the search in place and the other one, with the same models."""
    fast = [InferenceTransformer(noisy_transformer(seed)) for seed in seeds]
    ids = {"pad_id": PAD_ID, "eos_id": EOS_ID, "unk_id": UNK_ID}
    return Generator(fast, options, **ids, static_search=StaticSearch(fast)), Generator(fast, options, **ids)


def assert_same(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    assert [[x.tokens for x in nbest] for nbest in found] == [[x.tokens for x in nbest] for nbest in expected]
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.score == pytest.approx(b.score, abs=1e-9)
            assert a.token_scores == pytest.approx(b.token_scores, abs=1e-9)


@pytest.fixture
def short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tables be so small that searches outgrow them, and go on in smaller ones, all the time."""
    monkeypatch.setattr(module, "_STEPS", (2, 4, 8))
    monkeypatch.setattr(module, "_WIDTHS", (1, 3, 4, 5))
    monkeypatch.setattr(module, "_SENTENCES", (1, 2, 4))
    monkeypatch.setattr(module, "_SOURCE_LENGTHS", (3, 6))
    monkeypatch.setattr(module, "_KEPT_SHARE", 1)
    monkeypatch.setattr(module, "_FEWEST_ROWS", 0)
    monkeypatch.setattr(module, "_STEPS_A_LOOK", 1)


@pytest.mark.usefixtures("short_lists")
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), sentences=SENTENCES, data=st.data())
def test_all_options_find_what_the_other_search_finds(
    seed: int, sentences: list[list[int]], data: st.DataObject
) -> None:
    num_models = data.draw(st.sampled_from((1, 1, 2)))
    options = data.draw(decoding_options(num_models))
    prefixes = data.draw(forced_prefixes(len(sentences)))
    static, other = generators([seed + i for i in range(num_models)], options)
    source = sources(sentences)
    expected = other.generate(source, prefixes)
    assert_same(static.generate(source, prefixes), expected)
    assert_same(static.generate(source, prefixes), expected)  # where the first search has left its tables


@pytest.mark.usefixtures("short_lists")
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sentences=SENTENCES,
    beam=st.integers(1, 5),
    sampling=st.booleans(),
    data=st.data(),
)
def test_translations_are_the_same_in_any_batch(
    seed: int, sentences: list[list[int]], beam: int, sampling: bool, data: st.DataObject
) -> None:
    options = DecodingOptions(beam=beam, nbest=beam, max_len_a=1.0, max_len_b=4, sampling=sampling)
    static, _ = generators([seed], options)

    def translate(places: list[int]) -> list[list[Hypothesis]]:
        return static.generate(sources([sentences[i] for i in places]), lines=torch.tensor(places))

    alone = [translate([i])[0] for i in range(len(sentences))]
    order = data.draw(st.permutations(range(len(sentences))))
    assert_same(translate(list(order)), [alone[i] for i in order])


@pytest.mark.usefixtures("short_lists")
def test_many_sentences_go_on_in_smaller_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    # With looks one step late, sentences leave while others go on; each keeps its own results.
    monkeypatch.setattr(module, "_SENTENCES", (1, 2, 4, 8, 16, 32, 64))
    sizes: list[int] = []
    move = module.move_on_

    def record(*args: Any) -> None:
        sizes.append(args[2].sizes.num_sentences)
        move(*args)

    monkeypatch.setattr(module, "move_on_", record)
    options = DecodingOptions(beam=3, nbest=3, max_len_a=1.5, max_len_b=3)
    sentences = [[UNK_ID + (i * j) % 11 for j in range(1 + i % 9)] for i in range(60)]
    for seed in range(4):
        static, other = generators([seed], options)
        assert_same(static.generate(sources(sentences)), other.generate(sources(sentences)))
    assert len(set(sizes)) > 4


def test_stragglers_are_given_up_or_found_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "_STRAGGLING_SHARE", 2)
    monkeypatch.setattr(roster, "_STRAGGLING_TIMES", 1.0)
    options = DecodingOptions(beam=2, max_len_a=3.0, max_len_b=9)
    sentences = [[UNK_ID + i % 11] * (1 + i % 8) for i in range(40)]
    num_given_up = 0
    for seed in range(4):
        static, other = generators([seed], options)
        found = static.generate(sources(sentences), may_drop_stragglers=True)
        expected = other.generate(sources(sentences))
        assert_same([x for x in found if x], [y for x, y in zip(found, expected, strict=True) if x])
        num_given_up += found.count([])
    assert num_given_up > 0


def test_what_is_no_number_stays_with_its_search() -> None:
    # A model that gives NaN for one token only; its tables are used again afterwards.
    model = noisy_transformer(2)  # of two layers: the second one's past is no number
    bad = UNK_ID + 1
    with torch.no_grad():
        model.encoder.embedding.tokens.weight[bad] = torch.nan
    fast = [InferenceTransformer(model)]
    ids = {"pad_id": PAD_ID, "eos_id": EOS_ID, "unk_id": UNK_ID}
    options = DecodingOptions(beam=3, max_len_b=5)
    static = Generator(fast, options, **ids, static_search=StaticSearch(fast))
    good = [[UNK_ID + 2, UNK_ID + 3], [UNK_ID + 5]]
    expected = Generator(fast, options, **ids).generate(sources(good))
    together = static.generate(sources([good[0], [bad, bad], good[1]]))
    assert together[1] == [Hypothesis(tokens=[], score=-torch.inf, token_scores=[-torch.inf])]
    assert_same([together[0], together[2]], expected)
    assert_same(static.generate(sources(good)), expected)


class Operators(TorchDispatchMode):
    """Counts what is computed; views are free."""

    FREE = {
        "view",
        "transpose",
        "expand",
        "expand_as",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "t",
        "unbind",
    }
    FREE |= {"alias", "detach", "reshape", "permute", "flatten", "unflatten", "unfold"}

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function._overloadpacket.__name__
        if name not in self.FREE:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def operators_of_a_step(num_layers: int, options: DecodingOptions, *, is_late: bool = False) -> Counter[str]:
    """Count the operators of a step, of a search that has taken its first one already."""
    torch.manual_seed(1)
    model_options = TransformerOptions(
        encoder_layers=1,
        decoder_layers=num_layers,
        encoder_embed_dim=16,
        decoder_embed_dim=16,
        encoder_ffn_embed_dim=24,
        decoder_ffn_embed_dim=24,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    sizes = {"source_vocabulary_size": 200, "target_vocabulary_size": 200}
    model = Transformer(model_options, **sizes, pad_id=PAD_ID).eval()
    decoders = [StaticDecoder(InferenceTransformer(model))]
    settings = Settings(options, TokenIds(PAD_ID, EOS_ID, UNK_ID), (0.0,))
    with torch.inference_mode():
        tables = make_tables(
            decoders,
            Reserve(torch.device("cpu"), lambda: None),
            Sizes(2, settings.beam_size, 16, 32),
            score_dtype=torch.float32,
            keeps_tokens=settings.read_tokens,
            has_prefixes=is_late,
        )
        tables.source.fill_(EOS_ID)
        decoders[0].encode_(tables.decoders[0], tables.source)
        start_(
            tables,
            decoders,
            limits=torch.tensor([9, 9]),
            prefixes=None,
            streams=None,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
        )
        for _ in range(2):
            with Operators() as operators:
                run_step(decoders, tables, settings, width=16, some_at_limit=is_late, is_forced=is_late)
    return operators.counts


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        DecodingOptions(beam=1),
        DecodingOptions(beam=5),
        DecodingOptions(beam=5, no_repeat_ngram_size=2, repetition_penalty=1.2, temperature=0.7, unkpen=1.0),
        DecodingOptions(sampling=True),
        DecodingOptions(sampling=True, sampling_topk=3),
        DecodingOptions(sampling=True, sampling_topp=0.9),
    ],
)
def test_no_step_reads_from_the_device_or_copies_to_it(options: DecodingOptions, is_late: bool) -> None:
    # A recording would be refused, or would go on with what it once read.
    counts = operators_of_a_step(1, options, is_late=is_late)
    reads = {
        "_local_scalar_dense",
        "item",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "index",
        "lift_fresh",
    }
    assert not reads & set(counts)


def test_a_step_is_made_of_few_operators() -> None:
    # Of small ones each takes the time of its launch. A layer: three normalisations, six products, a copy into the
    # past and two attentions.
    one, two = (operators_of_a_step(n, DecodingOptions(beam=1)).total() for n in (1, 2))
    assert two - one == 12
    assert one - 12 <= 35


def out_of_memory_above(num_sentences: int) -> Callable[..., None]:
    def step(decoders: Any, tables: SearchTables, *args: Any, **options: Any) -> None:
        if tables.sizes.num_sentences > num_sentences:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        run_step(decoders, tables, *args, **options)

    return step


def test_a_search_without_memory_gives_its_tables_back_and_is_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_model(tmp_path / "model")
    lines = [" ".join(WORDS[i % len(WORDS)] for i in range(first, first + 4)) for first in range(12)]
    expected = Translator.load(folder).translate(lines)
    monkeypatch.setattr(module, "run_step", out_of_memory_above(4))
    translator = Translator.load(folder, in_place=True)
    assert translator.static_search is not None
    cleared: list[int] = []
    clear = translator.static_search.clear
    monkeypatch.setattr(translator.static_search, "clear", lambda: (cleared.append(1), clear()))
    assert translator.translate(lines) == expected
    assert cleared


def test_a_translator_finds_in_place_what_it_finds_otherwise(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    lines = [" ".join(WORDS[i % len(WORDS)] for i in range(first, 2 * first)) for first in range(30)]
    plain, in_place = (Translator.load(folder, in_place=x) for x in (False, True))
    assert plain.static_search is None and in_place.static_search is not None
    for decoding in (
        DecodingOptions(beam=3, nbest=2),
        DecodingOptions(sampling=True, beam=2),
        DecodingOptions(mbr="chrf", samples=4),
    ):
        found, expected = (list(x.translate_lines(lines, decoding)) for x in (in_place, plain))
        assert [x.texts for x in found] == [x.texts for x in expected]


def test_recordings_serve_the_next_batch_of_like_sizes() -> None:
    static, _ = generators([2], DecodingOptions(beam=2, max_len_b=3))
    search = static.static_search
    assert search is not None
    static.generate(sources([[5, 6, 7], [8]]))
    recordings = dict(search._known.recordings)
    static.generate(sources([[9, 4], [5, 5, 5]]))
    assert dict(search._known.recordings) == recordings
    search.clear()
    assert not search._known.recordings


def test_a_search_that_nobody_holds_gives_its_memory_back_at_once() -> None:
    static, _ = generators([2], DecodingOptions(beam=2, max_len_b=3))
    static.generate(sources([[5, 6, 7], [8]]))
    assert static.static_search is not None
    storage = weakref.ref(static.static_search._reserve)
    gc.disable()
    try:
        del static
        assert storage() is None
    finally:
        gc.enable()


def test_batches_of_a_gpu_are_what_its_memory_allows() -> None:
    batching = Batching().fill_in(num_bytes=10_000_000, bytes_of_piece=1000)
    assert batching.max_tokens == 4000 and batching.batch_size == 512
    assert Batching(batch_size=3).fill_in(num_bytes=10_000_000, bytes_of_piece=1000).batch_size == 3
    assert Batching(max_tokens=7).fill_in(num_bytes=10, bytes_of_piece=1) == Batching(max_tokens=7)
