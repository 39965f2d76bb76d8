"""Named sizes of the Transformer, under fairseq's names: a dict, and nothing else.

Sources: Vaswani et al., "Attention Is All You Need" (2017), table 3 (base, big);
fairseq/models/transformer/transformer_legacy.py (the iwslt, wmt and vaswani variants);
Wu et al., "Good for Misconceived Reasons" (ACL 2021), section 4 (tiny, for Multi30k).
"""

from collections.abc import Mapping


def _sizes(layers: int, dim: int, ffn_dim: int, heads: int) -> dict[str, int]:
    return {
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_embed_dim": dim,
        "decoder_embed_dim": dim,
        "encoder_ffn_embed_dim": ffn_dim,
        "decoder_ffn_embed_dim": ffn_dim,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
    }


_BIG = {**_sizes(6, 1024, 4096, 16), "dropout": 0.3}

ARCHITECTURES: Mapping[str, Mapping[str, object]] = {
    "transformer": _sizes(6, 512, 2048, 8),
    "transformer_tiny": _sizes(4, 128, 256, 4),
    "transformer_iwslt_de_en": _sizes(6, 512, 1024, 4),
    "transformer_wmt_en_de": _sizes(6, 512, 2048, 8),
    "transformer_vaswani_wmt_en_de_big": _BIG,
    "transformer_vaswani_wmt_en_fr_big": {**_BIG, "dropout": 0.1},
    "transformer_wmt_en_de_big": {**_BIG, "attention_dropout": 0.1},
    "transformer_wmt_en_de_big_t2t": {
        **_BIG,
        "encoder_normalize_before": True,
        "decoder_normalize_before": True,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
    },
}
