"""The Transformer: decoding step by step equals decoding at once; padding, variants, fairseq's conventions."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmt.models.blocks import sinusoids
from nmt.models.options import TransformerOptions
from nmt.models.transformer import Transformer

PAD = 1
VOCABULARY_SIZE = 19
TINY = TransformerOptions(
    encoder_layers=2,
    decoder_layers=2,
    encoder_embed_dim=8,
    decoder_embed_dim=8,
    encoder_ffn_embed_dim=16,
    decoder_ffn_embed_dim=16,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    max_source_positions=40,
    max_target_positions=40,
)
VARIANTS = {
    "post-norm": TINY,
    "pre-norm": replace(TINY, encoder_normalize_before=True, decoder_normalize_before=True),
    "learned positions": replace(TINY, encoder_learned_pos=True, decoder_learned_pos=True),
    "shared": replace(TINY, share_all_embeddings=True),
    "shared output, norm on embeddings, gelu": replace(
        TINY, share_decoder_input_output_embed=True, layernorm_embedding=True, activation_fn="gelu"
    ),
    "no scale, other widths": replace(
        TINY, no_scale_embedding=True, decoder_embed_dim=12, decoder_attention_heads=3, encoder_layers=1
    ),
}


def make_model(options: TransformerOptions, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(
        options, source_vocabulary_size=VOCABULARY_SIZE, target_vocabulary_size=VOCABULARY_SIZE, pad_id=PAD
    )
    return model.double().eval()


def pad(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


SOURCE = pad([[4, 5, 6, 7, 2], [8, 2], [9, 10, 2]])


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_decoding_token_by_token_equals_one_pass(options: TransformerOptions) -> None:
    model = make_model(options)
    memory = model.encode(SOURCE)
    target = torch.randint(4, VOCABULARY_SIZE, (3, 35), generator=torch.Generator().manual_seed(1))
    state = model.start_state()
    steps = [model.decode(target[:, t : t + 1], memory, state) for t in range(35)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model.decode(target, memory), rtol=0, atol=1e-12)
    assert state.length == 35


@settings(deadline=None, max_examples=25)
@given(data=st.data())
@torch.no_grad()
def test_state_follows_reordered_rows_in_chunks_of_any_size(data: st.DataObject) -> None:
    """Rows are duplicated, dropped and swapped, sentences leave, tokens come in chunks of any size."""
    model = make_model(VARIANTS["pre-norm"])
    token = st.integers(4, VOCABULARY_SIZE - 1)
    memory, source = model.encode(SOURCE), SOURCE
    beams = data.draw(st.integers(1, 3))
    prefixes = torch.empty(3 * beams, 0, dtype=torch.long)
    state = model.start_state()
    for _ in range(data.draw(st.integers(1, 4))):
        chunk = data.draw(st.integers(1, 4))
        size = len(prefixes) * chunk
        new = torch.tensor(data.draw(st.lists(token, min_size=size, max_size=size))).view(-1, chunk)
        prefixes = torch.cat([prefixes, new], dim=1)
        logits = model.decode(new, memory, state)
        expected = model.decode(prefixes, model.encode(source.repeat_interleave(beams, dim=0)))
        torch.testing.assert_close(logits, expected[:, -chunk:], rtol=0, atol=1e-12)
        # Some sentences stay, in any order, each with any of its rows.
        staying = data.draw(
            st.lists(st.sampled_from(range(len(source))), min_size=1, max_size=3, unique=True)
        )
        row_of = st.integers(0, beams - 1)
        rows = torch.tensor(
            [sentence * beams + data.draw(row_of) for sentence in staying for _ in range(beams)]
        )
        memory, source = memory.select(torch.tensor(staying)), source[staying]
        state.reorder_(rows)
        prefixes = prefixes[rows]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_padding_changes_nothing(options: TransformerOptions) -> None:
    model = make_model(options)
    together = model.decode(pad([[2, 4, 5, 6], [2, 7]]), model.encode(pad([[4, 5, 2], [6, 7, 8, 9, 2]])))
    alone = model.decode(torch.tensor([[2, 7]]), model.encode(torch.tensor([[6, 7, 8, 9, 2]])))
    first = model.decode(torch.tensor([[2, 4, 5, 6]]), model.encode(torch.tensor([[4, 5, 2]])))
    torch.testing.assert_close(together[1:, :2], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(together[:1], first, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_future_of_the_target_is_not_seen() -> None:
    model = make_model(TINY)
    memory = model.encode(torch.tensor([[4, 5, 2]]))
    one, other = (model.decode(torch.tensor([[2, 4, last]]), memory) for last in (5, 6))
    torch.testing.assert_close(one[:, :2], other[:, :2], rtol=0, atol=0)
    assert (one[:, 2] != other[:, 2]).any()


def test_tied_embeddings_are_one_parameter() -> None:
    shared = make_model(VARIANTS["shared"])
    assert shared.output_weight is shared.encoder.embedding.tokens.weight
    apart = make_model(TINY)
    names = {
        name for name, _ in apart.named_parameters() if name.endswith(("tokens.weight", "output_weight"))
    }
    assert names == {"output_weight", "encoder.embedding.tokens.weight", "decoder.embedding.tokens.weight"}


def test_sinusoids_are_fairseqs() -> None:
    # Width 4: the two frequencies are 1 and 1/10000; sines first, then cosines.
    expected = torch.tensor([3.0, 3e-4]).double()
    torch.testing.assert_close(
        sinusoids(4, 4)[3].double(), torch.cat([expected.sin(), expected.cos()]), rtol=0, atol=1e-7
    )


def test_positions_start_after_the_padding_id() -> None:
    model = make_model(replace(TINY, dropout=0.0, no_scale_embedding=True))
    embedding = model.encoder.embedding
    embedded = embedding(torch.tensor([[7]]))
    expected = embedding.tokens.weight[7] + sinusoids(3, 8)[2].double()
    torch.testing.assert_close(embedded[0, 0], expected, rtol=0, atol=1e-12)
