"""The decoder in place, step by step, against the plain one in a single pass."""

from typing import Any

import pytest
import torch

from nmt.models.inference import InferenceTransformer
from nmt.models.options import TransformerOptions
from nmt.models.reserve import Reserve
from nmt.models.static_decoder import DecoderTables, Sizes, StaticDecoder
from nmt.models.transformer import Transformer

PAD, EOS = 1, 2
LENGTH = 7
SOURCE = torch.tensor([[5, 6, 7, EOS], [8, EOS, PAD, PAD], [9, 10, EOS, PAD]])


def make_model(changes: dict[str, Any]) -> Transformer:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 2, "max_target_positions": LENGTH + 1}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_embed_dim": 16, f"{side}_ffn_embed_dim": 24, f"{side}_attention_heads": 2}
    options = TransformerOptions(**(sizes | changes))
    model = Transformer(options, source_vocabulary_size=14, target_vocabulary_size=12, pad_id=PAD)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def start(decoder: StaticDecoder, reserve: Reserve, sizes: Sizes) -> DecoderTables:
    tables = decoder.tables(reserve, "x", sizes)
    source = torch.full((sizes.num_sentences, sizes.source_length), PAD)
    source[:, 0] = EOS
    source[: SOURCE.size(0), : SOURCE.size(1)] = SOURCE
    decoder.encode_(tables, source)
    decoder.start_(tables)
    return tables


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder_normalize_before": True, "encoder_normalize_before": True},
        {"layernorm_embedding": True},
        {"layernorm_embedding": True, "decoder_normalize_before": True, "no_scale_embedding": True},
        {"activation_fn": "gelu", "decoder_learned_pos": True},
        {"encoder_embed_dim": 24, "encoder_layers": 2, "decoder_layers": 3},
        {"share_decoder_input_output_embed": True, "decoder_attention_heads": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("beam_size", [1, 3])
@torch.inference_mode()
def test_steps_equal_one_pass(changes: dict[str, Any], beam_size: int) -> None:
    # Hypotheses branch at random: what each has seen is what its ancestors were given.
    model = make_model(changes)
    decoder = StaticDecoder(InferenceTransformer(model))
    tables = start(decoder, Reserve(torch.device("cpu"), lambda: None), Sizes(4, beam_size, 6, 8))
    tokens = torch.randint(3, 12, (4, beam_size, 1))
    for step in range(LENGTH):
        features = decoder.features(
            tables, tokens[:, :, -1].flatten(), torch.tensor(step), width=min(8, step + 2)
        )
        found = decoder.project(features).view(4, beam_size, -1)
        rows = tokens[:3].flatten(0, 1)
        expected = model.decode(rows, model.encode(SOURCE))[:, -1].view(3, beam_size, -1)
        torch.testing.assert_close(found[:3], expected, rtol=0, atol=1e-10)
        parents = torch.randint(0, beam_size, (4, beam_size))
        if beam_size > 1:
            decoder.reorder_(tables, parents, width=min(8, step + 2))
        tokens = tokens.gather(1, parents[:, :, None].expand_as(tokens))
        tokens = torch.cat([tokens, torch.randint(3, 12, (4, beam_size, 1))], dim=2)


@torch.inference_mode()
def test_a_decoder_goes_on_in_tables_of_other_sizes() -> None:
    model = make_model({})
    decoder = StaticDecoder(InferenceTransformer(model))
    tokens = torch.randint(3, 12, (4, 2, 6))
    names: list[str] = []
    reserve = Reserve(torch.device("cpu"), lambda: names.append("moved"))
    tables = start(decoder, reserve, Sizes(4, 2, 6, 2))
    kept = torch.arange(4)
    for step in range(6):
        if step == 2:  # more room: the storage is another one
            larger = decoder.tables(reserve, "x", Sizes(4, 2, 6, 8))
            assert names
            decoder.move_(tables, larger, None)
            tables = larger
        if step == 4:  # fewer sentences, in other places of the same storage
            names.clear()
            kept = torch.tensor([2, 0])
            smaller = decoder.tables(reserve, "x", Sizes(2, 2, 6, 8))
            assert not names
            decoder.move_(tables, smaller, kept)
            tables = smaller
        features = decoder.features(
            tables, tokens[kept, :, step].flatten(), torch.tensor(step), width=tables.sizes.num_steps
        )
        found = decoder.project(features).view(len(kept), 2, -1)
        rows = tokens[:3, :, : step + 1].flatten(0, 1)
        expected = model.decode(rows, model.encode(SOURCE))[:, -1].view(3, 2, -1)
        known = kept < 3
        torch.testing.assert_close(found[known], expected[kept[known]], rtol=0, atol=1e-10)


def test_storage_is_zero_at_first_and_grows_to_the_largest() -> None:
    moves: list[int] = []
    reserve = Reserve(torch.device("cpu"), lambda: moves.append(1))
    small = reserve.take("a", (2, 3), torch.float32)
    assert small.eq(0).all()
    reserve.take("b", (9,), torch.int64)
    assert not moves
    large = reserve.take("a", (4, 3), torch.float32)
    assert moves == [1]
    assert reserve.take("a", (3, 1), torch.float32).data_ptr() == large.data_ptr()
    assert moves == [1]
