"""The settings in a fairseq checkpoint: their allowed values, and the model that they describe.

They come from a pickle, so each may be anything. One table has the type and the bounds of every setting that is
used. No setting is used before all are checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmt.config.records import LANGUAGE, Flag, Maybe, Number, Record, Schema, Text, Whole, check_record
from nmt.errors import UserError, shown
from nmt.interop.stored_zip import NAME_ANOTHER
from nmt.models.options import LARGEST, TransformerOptions

# Sizes that a checkpoint need not name: fairseq's base architecture.
_DEFAULT_SIZES = {"embed_dim": 512, "ffn_embed_dim": 2048, "layers": 6, "attention_heads": 8}
_FLAGS = ("share_all_embeddings", "layernorm_embedding", "no_scale_embedding")
_SIDE_FLAGS = ("normalize_before", "learned_pos")
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "relu_dropout")
_DEFAULT_POSITIONS = 1024
_POSITIONS = ("max_source_positions", "max_target_positions")

# Variants that compute something else. Each must have the value of the plain Transformer.
_OUTSIDE = (
    "adaptive_input",
    "adaptive_softmax_cutoff",
    "cross_self_attention",
    "decoder_layers_to_keep",
    "encoder_layers_to_keep",
    "merge_src_tgt_embed",
    "moe_freq",
    "no_cross_attention",
    "no_decoder_final_norm",
    "no_token_positional_embeddings",
    "quant_noise_pq",
    "quant_noise_scalar",
    "scale_attn",
    "scale_fc",
    "scale_heads",
    "scale_resids",
)

_FLAG = Flag(takes_numbers=True)
_MODEL_SETTINGS: dict[str, Schema] = {
    **{
        f"{side}_{name}": Maybe(Whole(0, LARGEST[name]))  # 0 also stands for the default
        for side in ("encoder", "decoder")
        for name in _DEFAULT_SIZES
    },
    **{f"{side}_{name}": _FLAG for side in ("encoder", "decoder") for name in _SIDE_FLAGS},
    **dict.fromkeys((*_FLAGS, "share_decoder_input_output_embed"), _FLAG),
    **{name: Maybe(Number(0.0, 1.0)) for name in _DROPOUTS},
    **{name: Maybe(Whole(0, LARGEST["positions"])) for name in _POSITIONS},
    **{name: Maybe(Whole(0, LARGEST["embed_dim"])) for name in ("decoder_input_dim", "decoder_output_dim")},
    "activation_fn": Maybe(Text(longest=100)),
}
_MODEL = Record({}, optional=_MODEL_SETTINGS)
_TASK = Record(
    {}, optional={name: Maybe(Text(longest=100)) for name in ("_name", "task", "source_lang", "target_lang")}
)


def read_settings(
    content: Mapping[str, Any], checkpoint: Path
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the settings of the model and of the task, from old `args` or new `cfg`.

    Raises:
        UserError: There are no settings, one has a wrong type or is out of bounds, or the task is not translation.
    """
    config, arguments = content.get("cfg"), content.get("args")
    if isinstance(config, dict) and isinstance(config.get("model"), dict):
        model = dict(config["model"])
        task = config["task"] if isinstance(config.get("task"), dict) else model
    elif isinstance(arguments, dict):
        model = task = dict(arguments)
    else:
        raise UserError(
            f"`{checkpoint}` must be a checkpoint of fairseq, but has neither `cfg` nor `args`. {NAME_ANOTHER}"
        )
    # Settings of the newest releases may be nested: encoder.embed_dim for encoder_embed_dim.
    for side in ("encoder", "decoder"):
        if isinstance(nested := model.get(side), dict):
            model |= {f"{side}_{name}": value for name, value in nested.items() if isinstance(name, str)}
    where = f"`{checkpoint}`"
    task = check_record(_TASK, task, where=where)
    task_name = task.get("_name") or check_record(_TASK, model, where=where).get("task")
    if task_name not in (None, "translation"):
        raise outside(checkpoint, f"its task is `{shown(task_name)[1:-1]}`, not translation")
    for name in ("source_lang", "target_lang"):
        if task.get(name):
            check_record(Record({name: LANGUAGE}), task, where=where)
    return check_record(_MODEL, model, where=where), task


def read_options(settings: Mapping[str, Any], checkpoint: Path) -> TransformerOptions:
    """Return the options of the model that settings describe, after `read_settings` has checked them.

    Raises:
        UserError: They describe a model that our Transformer cannot be.
    """
    for name in _OUTSIDE:
        if settings.get(name):
            raise outside(checkpoint, f"`{name}` is {shown(settings[name])}")
    sizes: dict[str, Any] = {}
    flags: dict[str, Any] = {name: settings.get(name, False) for name in _FLAGS}
    for side in ("encoder", "decoder"):
        for name, default in _DEFAULT_SIZES.items():
            # In fairseq the decoder is as wide as the encoder unless the settings say something else.
            if side == "decoder" and name in ("embed_dim", "ffn_embed_dim"):
                default = sizes[f"encoder_{name}"]
            sizes[f"{side}_{name}"] = settings.get(f"{side}_{name}") or default
        for name in _SIDE_FLAGS:
            flags[f"{side}_{name}"] = settings.get(f"{side}_{name}", False)
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if (settings.get(name) or sizes["decoder_embed_dim"]) != sizes["decoder_embed_dim"]:
            raise outside(checkpoint, f"`{name}` is {settings[name]} and not the decoder's width")
    activation: Any = settings.get("activation_fn") or "relu"
    if activation not in ("relu", "gelu"):
        raise outside(checkpoint, f"`activation_fn` is {shown(activation)}, neither relu nor gelu")
    shared = settings.get("share_decoder_input_output_embed", False) and not flags["share_all_embeddings"]
    dropout = settings.get("dropout")
    options = TransformerOptions(
        **sizes,
        **flags,
        share_decoder_input_output_embed=shared,
        activation_fn=activation,
        dropout=0.1 if dropout is None else dropout,
        attention_dropout=settings.get("attention_dropout") or 0.0,
        activation_dropout=settings.get("activation_dropout") or settings.get("relu_dropout") or 0.0,
        max_source_positions=settings.get("max_source_positions") or _DEFAULT_POSITIONS,
        max_target_positions=settings.get("max_target_positions") or _DEFAULT_POSITIONS,
    )
    try:
        options.check()
    except UserError as error:
        raise UserError(f"`{checkpoint}`: {error}") from None
    return options


def outside(checkpoint: Path, why: str) -> UserError:
    """Return the error for a checkpoint with another kind of model."""
    return UserError(
        f"`{checkpoint}` must hold a plain Transformer for translation, but {why}. Other models stay with fairseq."
    )
