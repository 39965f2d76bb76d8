"""Rules of a search: each by itself on scores made by hand, and those of single sentences in a batch."""

import math

import pytest
import torch
from support.random_transformer import random_transformer
from support.table_model import EOS, PAD, UNK, A, B, TableModel, from_table, random_table
from torch import Tensor

from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.generation.beam_search import Beam, Hypothesis, start
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.generation.rules import (
    Rule,
    TokenIds,
    begin_with,
    end_at_limit,
    never,
    no_repeats,
    of_rows,
    penalize,
    search_rules,
    shortest,
    unless,
)
from nmt.generation.static_search import StaticSearch
from nmt.models.inference import InferenceTransformer

SIZE = 6
NO = -math.inf


def beam_of(tokens: list[list[int]], *, limits: list[int]) -> Beam:
    """Return a beam of one hypothesis a sentence."""
    beam, _ = start(torch.tensor(limits), beam_size=1, dtype=torch.float64)
    so_far = torch.tensor(tokens, dtype=torch.int64).view(len(limits), 1, -1)
    return Beam(so_far, so_far.double(), beam.scores, beam.sentences, beam.limits, beam.is_done)


def apply(rule: Rule, beam: Beam) -> list[list[float]]:
    """Let a rule change scores that are 0, 1, 2 ... times -1 for the tokens of each sentence."""
    scores = -torch.arange(SIZE, dtype=torch.float64).repeat(beam.limits.numel(), 1, 1)
    rule(scores, beam)
    found: list[list[float]] = scores.squeeze(1).tolist()
    return found


FREE = [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]


def without(*tokens: int) -> list[float]:
    return [NO if token in tokens else score for token, score in enumerate(FREE)]


def only(token: int) -> list[float]:
    return [score if token == own else NO for own, score in enumerate(FREE)]


def test_each_rule_takes_away_what_it_says() -> None:
    beam = beam_of([[A, B, A], [A, A, B]], limits=[9, 9])
    assert apply(never(PAD), beam) == [without(PAD)] * 2
    assert apply(penalize(UNK, 0.5), beam)[0][UNK] == FREE[UNK] - 0.5
    assert apply(shortest(4, EOS), beam) == [without(EOS)] * 2
    assert apply(shortest(3, EOS), beam) == [FREE] * 2
    assert apply(no_repeats(2), beam) == [without(B), FREE]


def test_what_is_prescribed_keeps_the_score_that_it_had_before_other_rules() -> None:
    beam = beam_of([[A], [A], [B]], limits=[1, 9, 9])
    prefixes = torch.tensor([[A, B], [A, EOS], [B, PAD]])
    bans = [shortest(5, EOS), no_repeats(1)]
    forced = unless(begin_with(prefixes, pad_id=PAD), bans)
    assert apply(forced, beam) == [only(B), only(EOS), without(EOS, B)]
    ends = unless(end_at_limit(EOS), [forced])
    assert apply(ends, beam) == [only(EOS), only(EOS), without(EOS, B)]  # the limit goes before the prefix


def test_where_nothing_can_be_prescribed_the_other_rules_are_all() -> None:
    beam = beam_of([[A, B], [B, B]], limits=[5, 7])
    bans = [never(UNK)]
    assert apply(unless(end_at_limit(EOS, first_limit=5), bans), beam) == [without(UNK)] * 2
    assert apply(unless(begin_with(torch.tensor([[A], [B]]), pad_id=PAD), bans), beam) == [without(UNK)] * 2


def test_options_that_say_nothing_make_no_rule() -> None:
    ids = TokenIds(pad=PAD, eos=EOS, unk=UNK)
    assert len(search_rules(DecodingOptions(min_len=0), ids, first_limit=None)) == 1  # no padding
    all_of_them = DecodingOptions(min_len=2, unkpen=1.0, no_repeat_ngram_size=2)
    assert len(search_rules(all_of_them, ids, first_limit=None)) == 4


def forbid(forbidden: Tensor) -> Rule:
    """Forbid tokens of single sentences, (N, V) bool."""

    def rule(scores: Tensor, beam: Beam) -> None:
        scores.masked_fill_(forbidden[beam.sentences][:, None], -torch.inf)

    return rule


def test_a_rule_for_rows_knows_them_by_their_sentences() -> None:
    forbidden = torch.zeros(2, SIZE, dtype=torch.bool)
    forbidden[1, A] = True
    beam = beam_of([[], [], []], limits=[9, 9, 9])
    renamed = of_rows(forbid(forbidden), torch.tensor([1, 0, 1]))
    assert apply(renamed, beam) == [without(A), FREE, without(A)]


@pytest.mark.parametrize("options", [DecodingOptions(beam=3), DecodingOptions(beam=3, sampling=True, seed=5)])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_rule_for_one_sentence_leaves_its_neighbours_alone(
    options: DecodingOptions, in_place: bool
) -> None:
    models = [InferenceTransformer(random_transformer(3, torch.float64))]
    static = StaticSearch(models) if in_place else None
    ids = {"pad_id": PAD_ID, "eos_id": EOS_ID, "unk_id": UNK_ID}
    generator = Generator(models, options, **ids, static_search=static)
    source = torch.tensor([[5 + i % 4, 6 + i % 5, EOS_ID] for i in range(20)])  # some are done before others
    free = generator.generate(source)
    common = free[7][0].tokens[0]
    forbidden = torch.zeros(20, models[0].plain.output_weight.size(0), dtype=torch.bool)
    forbidden[7, common] = True
    found = generator.generate(source, rules=[forbid(forbidden)])
    assert all(common not in x.tokens for x in found[7])
    assert tokens_of(found[:7] + found[8:]) == tokens_of(free[:7] + free[8:])
    alone = generator.generate(source[7:8], lines=torch.tensor([7]), rules=[forbid(forbidden[7:8])])
    assert tokens_of(alone) == tokens_of(found[7:8])


def tokens_of(results: list[list[Hypothesis]]) -> list[list[list[int]]]:
    return [[x.tokens for x in nbest] for nbest in results]


def test_a_rule_of_the_caller_is_as_good_as_one_of_the_options() -> None:
    table = random_table(3, 8)
    source = torch.tensor([[4, EOS], [5, EOS]])

    def search(options: DecodingOptions, *rules: Rule) -> list[list[Hypothesis]]:
        model = TableModel(table)
        return Generator([model], options, pad_id=PAD, eos_id=EOS, unk_id=UNK).generate(source, rules=rules)

    plain = DecodingOptions(beam=3, max_len_b=6)
    with_option = search(DecodingOptions(beam=3, max_len_b=6, no_repeat_ngram_size=1))
    assert search(plain, no_repeats(1)) == with_option != search(plain)


def test_a_prefix_goes_before_a_rule_of_the_caller() -> None:
    table = from_table({(): {A: 0.7, B: 0.2, EOS: 0.1}, (B,): {A: 0.6, B: 0.3, EOS: 0.1}})
    generator = Generator(
        [TableModel(table)], DecodingOptions(beam=1, max_len_b=3), pad_id=PAD, eos_id=EOS, unk_id=UNK
    )
    ((found,),) = generator.generate(torch.tensor([[A, EOS]]), torch.tensor([[B]]), rules=[never(B)])
    assert found.tokens[0] == B
    assert found.token_scores[0] == pytest.approx(math.log(0.2))
    assert B not in found.tokens[1:]
