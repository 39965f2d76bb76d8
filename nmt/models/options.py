"""The options of a model, and those of the Transformer. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from nmt.config.fields import key_of
from nmt.config.ranges import check_limits, limits
from nmt.errors import UserError
from nmt.models.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from torch import nn

    from nmt.models.transformer import Transformer

FIXED = {"fixed": True}  # may not change when a run is resumed

# Larger than any model that has been trained. A damaged file with larger sizes would cost memory and time.
LARGEST = {
    "layers": 1000,
    "embed_dim": 2**16,
    "ffn_embed_dim": 2**18,
    "attention_heads": 2**12,
    "positions": 2**17,
}
_LARGEST_TABLE = 2**27  # numbers in a table of positions


class ModelOptions(Protocol):
    """The options of a translation model: a frozen dataclass that makes the model.

    Sizes have `metadata={"fixed": True}`, so that a run cannot be resumed with other sizes. If there is a field
    `share_all_embeddings` and it is true, both languages must have the same vocabulary.
    """

    @property
    def max_source_positions(self) -> int:
        """The most tokens of a source, its eos counted; a field, or a constant."""

    @property
    def max_target_positions(self) -> int:
        """The most tokens of a target, its eos counted."""

    def build(self, *, source_vocabulary_size: int, target_vocabulary_size: int, pad_id: int) -> nn.Module:
        """Make a model with fresh parameters; `nmt/models/protocols.py` says what it must be able to do."""


@dataclass(frozen=True)
class TransformerOptions:
    """Sizes and variants of the encoder-decoder Transformer."""

    arch: str = field(default="transformer", metadata={"presets": ARCHITECTURES})
    """Named sizes that the options below start from."""
    encoder_layers: int = field(default=6, metadata=limits(least=1, fixed=True))
    """Number of encoder layers."""
    decoder_layers: int = field(default=6, metadata=limits(least=1, fixed=True))
    """Number of decoder layers."""
    encoder_embed_dim: int = field(default=512, metadata=limits(least=1, fixed=True))
    """Width of the encoder."""
    decoder_embed_dim: int = field(default=512, metadata=limits(least=1, fixed=True))
    """Width of the decoder."""
    encoder_ffn_embed_dim: int = field(default=2048, metadata=limits(least=1, fixed=True))
    """Inner width of the encoder's feed-forward blocks."""
    decoder_ffn_embed_dim: int = field(default=2048, metadata=limits(least=1, fixed=True))
    """Inner width of the decoder's feed-forward blocks."""
    encoder_attention_heads: int = field(default=8, metadata=limits(least=1, fixed=True))
    """Number of attention heads in the encoder."""
    decoder_attention_heads: int = field(default=8, metadata=limits(least=1, fixed=True))
    """Number of attention heads in the decoder."""
    encoder_normalize_before: bool = field(default=False, metadata=FIXED)
    """Normalise before each encoder block (pre-norm) instead of after it (post-norm)."""
    decoder_normalize_before: bool = field(default=False, metadata=FIXED)
    """Normalise before each decoder block (pre-norm) instead of after it (post-norm)."""
    encoder_learned_pos: bool = field(default=False, metadata=FIXED)
    """Learn the encoder's positions instead of using sinusoids."""
    decoder_learned_pos: bool = field(default=False, metadata=FIXED)
    """Learn the decoder's positions instead of using sinusoids."""
    share_all_embeddings: bool = field(default=False, metadata=FIXED)
    """One matrix for source, target and output embeddings (needs a joined vocabulary)."""
    share_decoder_input_output_embed: bool = field(default=False, metadata=FIXED)
    """One matrix for the decoder's input embeddings and the output projection."""
    layernorm_embedding: bool = field(default=False, metadata=FIXED)
    """Normalise the sum of token and position embeddings."""
    no_scale_embedding: bool = field(default=False, metadata=FIXED)
    """Do not multiply token embeddings by the square root of the width."""
    activation_fn: Literal["relu", "gelu", "swiglu"] = field(default="relu", metadata=FIXED)
    """Activation of the feed-forward blocks; swiglu has a gate besides, and half as many weights again."""
    norm_fn: Literal["layer", "rms"] = field(default="layer", metadata=FIXED)
    """Normalisation of all blocks: by mean and deviation (layer), or by the root of the mean square (rms)."""
    dropout: float = field(default=0.1, metadata=limits(least=0, below=1))
    """Dropout on embeddings and on the output of each block."""
    attention_dropout: float = field(default=0.0, metadata=limits(least=0, below=1))
    """Dropout on attention weights."""
    activation_dropout: float = field(default=0.0, metadata=limits(least=0, below=1))
    """Dropout after the activation of the feed-forward blocks."""
    encoder_layerdrop: float = field(default=0.0, metadata=limits(least=0, below=1))
    """LayerDrop: probability with which an encoder layer is left out of a pass in training."""
    decoder_layerdrop: float = field(default=0.0, metadata=limits(least=0, below=1))
    """The same of a decoder layer."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the layers in training and compute the rest anew in the backward pass: less memory,
    but up to a third more to compute."""
    max_source_positions: int = field(default=1024, metadata=limits(least=2, fixed=True))
    """Longest source in tokens, end of sentence included."""
    max_target_positions: int = field(default=1024, metadata=limits(least=2, fixed=True))
    """Longest target in tokens, end of sentence included."""

    def build(self, *, source_vocabulary_size: int, target_vocabulary_size: int, pad_id: int) -> Transformer:
        """Make a Transformer with fresh parameters."""
        from nmt.models.transformer import Transformer

        return Transformer(
            self,
            source_vocabulary_size=source_vocabulary_size,
            target_vocabulary_size=target_vocabulary_size,
            pad_id=pad_id,
        )

    def check(self) -> None:
        """Raise `UserError` where the sizes do not fit together."""
        check_limits(self)
        for side in ("encoder", "decoder"):
            dim = getattr(self, f"{side}_embed_dim")
            heads = getattr(self, f"{side}_attention_heads")
            for name in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads"):
                value = getattr(self, f"{side}_{name}")
                if value > LARGEST[name]:
                    raise UserError(
                        f"`{side}-{name.replace('_', '-')}` must be at most {LARGEST[name]:,}, but is {value:,}."
                    )
            if dim % heads:
                raise UserError(
                    f"`{side}-embed-dim` must be a multiple of `{side}-attention-heads` ({heads}), but is {dim}. "
                    "Change one."
                )
            if dim % 2 and not getattr(self, f"{side}_learned_pos"):
                raise UserError(
                    f"`{side}-embed-dim` must be even for sinusoidal positions, but is {dim}. "
                    f"Change it or set `{side}-learned-pos`."
                )
        for name, dim in (
            ("max_source_positions", self.encoder_embed_dim),
            ("max_target_positions", self.decoder_embed_dim),
        ):
            value, flag = getattr(self, name), key_of(name)
            largest = min(LARGEST["positions"], _LARGEST_TABLE // dim)
            if value > largest:
                raise UserError(
                    f"`{flag}` must be at most {largest:,} at a width of {dim:,}, but is {value:,}."
                )
        if self.share_all_embeddings and self.encoder_embed_dim != self.decoder_embed_dim:
            raise UserError(
                "`share-all-embeddings` must have equal widths on both sides, but `encoder-embed-dim` is "
                f"{self.encoder_embed_dim} and `decoder-embed-dim` is {self.decoder_embed_dim}. "
                "Make them equal, or leave it out."
            )
