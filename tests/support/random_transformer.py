"""Small untrained Transformers, for tests of the search."""

import torch

from nmt.data.vocabulary import PAD_ID
from nmt.models.options import TransformerOptions
from nmt.models.transformer import Transformer

VOCABULARY_SIZE = 14
TWO_LAYERS = TransformerOptions(
    encoder_layers=2,
    decoder_layers=2,
    encoder_embed_dim=32,
    decoder_embed_dim=48,
    encoder_ffn_embed_dim=64,
    decoder_ffn_embed_dim=64,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
)


def random_transformer(seed: int, dtype: torch.dtype) -> Transformer:
    """Make an untrained model whose weights are scaled up, so that its outputs are far from uniform."""
    torch.manual_seed(seed)
    options = TransformerOptions(
        encoder_layers=1 + seed % 2,
        decoder_layers=1 + seed // 2 % 2,
        encoder_embed_dim=16,
        decoder_embed_dim=16,
        encoder_ffn_embed_dim=24,
        decoder_ffn_embed_dim=24,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_normalize_before=bool(seed // 4 % 2),
        decoder_normalize_before=bool(seed // 4 % 2),
        encoder_learned_pos=bool(seed // 8 % 2),
        decoder_learned_pos=bool(seed // 8 % 2),
        max_source_positions=32,
        max_target_positions=32,
    )
    model = Transformer(
        options,
        source_vocabulary_size=VOCABULARY_SIZE,
        target_vocabulary_size=VOCABULARY_SIZE,
        pad_id=PAD_ID,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.to(dtype).eval()
