"""fairseq's translation models, turned into model folders.

In scope is the `transformer` family of the task `translation`. Its settings are in the checkpoint, as `args`
(until 2020) or as `cfg` (since). Names and meanings are those of fairseq's models/transformer. fairseq itself is
not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nmt.checkpoint import write_model_folder
from nmt.data.data_directory import dictionary_name, find_language_pair
from nmt.data.vocabulary import Vocabulary
from nmt.errors import UserError, shown
from nmt.interop.safe_unpickle import StoredTensor, read_torch_file
from nmt.models.options import TransformerOptions
from nmt.models.transformer import Transformer
from nmt.options import TrainConfig
from nmt.task import Task
from nmt.translation.assets import TranslationAssets
from nmt.translation.options import TranslationOptions
from nmt.translation.task import TranslationTask
from nmt.weights import weights

# Sizes that a checkpoint need not name: fairseq's base architecture.
_DEFAULT_SIZES = {"embed_dim": 512, "ffn_embed_dim": 2048, "layers": 6, "attention_heads": 8}
_FLAGS = ("share_all_embeddings", "layernorm_embedding", "no_scale_embedding")

# Variants that compute something else: each must be as in the plain Transformer.
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
# Written into checkpoints, but no weights: versions, and sinusoids of old releases.
_NO_WEIGHTS = re.compile(r"(encoder|decoder)\.(version|embed_positions\.(_float_tensor|weights))")
_OLD_NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}


@dataclass(frozen=True)
class Conversion:
    """What has been converted, for the report."""

    options: TransformerOptions
    source_lang: str
    target_lang: str
    num_parameters: int
    is_guessed: bool  # which of the two languages is the source


def convert_checkpoint(
    checkpoint: Path, dict_dir: Path, output: Path, *, source_lang: str | None, target_lang: str | None
) -> Conversion:
    """Write a model folder that computes what fairseq computes from a checkpoint.

    Args:
        checkpoint: A file of fairseq's, such as checkpoint_best.pt.
        dict_dir: Holds `dict.<lang>.txt` of both languages.
        output: The model folder to write; it must not exist.
        source_lang: Needed only where neither the checkpoint nor the names in `dict_dir` tell it.
        target_lang: The same.

    Raises:
        UserError: The checkpoint cannot be read, or its model is outside the family; the first reason is named.
    """
    content = read_torch_file(checkpoint)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"`{checkpoint}` must be a checkpoint of fairseq, but has no `model` in it.")
    settings, task_settings = _read_settings(content, checkpoint)
    options = read_options(settings, checkpoint)
    tensors = _load_tensors(content["model"], checkpoint)
    source, target, is_guessed = _languages(
        dict_dir,
        source_lang or _text(task_settings.get("source_lang")),
        target_lang or _text(task_settings.get("target_lang")),
        sizes=(
            len(_take(tensors, "encoder.embed_tokens.weight", checkpoint)),
            _target_size(tensors, checkpoint),
        ),
    )
    assets = TranslationAssets(source, target, folder=dict_dir, segmenter=None)
    task = TranslationTask(TranslationOptions(data=dict_dir, model=options, eval_bleu=False), assets)
    for lang, vocabulary, size in (
        (source, task.source_vocabulary, len(tensors["encoder.embed_tokens.weight"])),
        (target, task.target_vocabulary, _target_size(tensors, checkpoint)),
    ):
        if len(vocabulary) != size:
            raise UserError(
                f"`{dict_dir / dictionary_name(lang)}` must have {size:,} types (special ones included) for "
                f"`{checkpoint}`, but has {len(vocabulary):,}. Name the folder of the model's own dictionaries."
            )
    model = task.build_model()
    assert isinstance(model, Transformer)
    available = convert_tensors(tensors, options, checkpoint=checkpoint)
    converted = {name: available[name] for name in weights(model)}  # tied ones once
    for name, tensor in weights(model).items():
        if converted[name].shape != tensor.shape:
            raise UserError(
                f"`{checkpoint}` must have the sizes that its settings say, but `{name}` would be of shape "
                f"{tuple(tensor.shape)} and is {tuple(converted[name].shape)}."
            )
    config = TrainConfig(task_options=task.options, save_dir=output)
    write_model_folder(output, converted, config=config, task=cast(Task[Any], task))
    return Conversion(options, source, target, sum(x.numel() for x in converted.values()), is_guessed)


def read_options(settings: Mapping[str, Any], checkpoint: Path) -> TransformerOptions:
    """Return the options of the model that fairseq's settings describe.

    Raises:
        UserError: They describe something that this Transformer is not.
    """
    for name in _OUTSIDE:
        if settings.get(name):
            raise _outside(checkpoint, f"`{name}` is {shown(settings[name])}")
    sizes: dict[str, Any] = {}
    flags: dict[str, Any] = {name: bool(settings.get(name, False)) for name in _FLAGS}
    for side in ("encoder", "decoder"):
        for name, default in _DEFAULT_SIZES.items():
            # fairseq lets the decoder be as wide as the encoder where nothing else is said.
            if side == "decoder" and name in ("embed_dim", "ffn_embed_dim"):
                default = sizes[f"encoder_{name}"]
            sizes[f"{side}_{name}"] = int(settings.get(f"{side}_{name}") or default)
        for name in ("normalize_before", "learned_pos"):
            flags[f"{side}_{name}"] = bool(settings.get(f"{side}_{name}", False))
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if (settings.get(name) or sizes["decoder_embed_dim"]) != sizes["decoder_embed_dim"]:
            raise _outside(checkpoint, f"`{name}` is {settings[name]} and not the decoder's width")
    activation: Any = settings.get("activation_fn") or "relu"
    if activation not in ("relu", "gelu"):
        raise _outside(checkpoint, f"`activation_fn` is {shown(activation)}, neither relu nor gelu")
    shared = (
        bool(settings.get("share_decoder_input_output_embed", False)) and not flags["share_all_embeddings"]
    )
    options = TransformerOptions(
        **sizes,
        **flags,
        share_decoder_input_output_embed=shared,
        activation_fn=activation,
        dropout=float(settings.get("dropout", 0.1)),
        attention_dropout=float(settings.get("attention_dropout", 0.0)),
        activation_dropout=float(settings.get("activation_dropout") or settings.get("relu_dropout") or 0.0),
        max_source_positions=int(settings.get("max_source_positions") or 1024),
        max_target_positions=int(settings.get("max_target_positions") or 1024),
    )
    try:
        options.check()
    except UserError as error:
        raise UserError(f"`{checkpoint}`: {error}") from None
    return options


def convert_tensors(
    tensors: Mapping[str, Tensor], options: TransformerOptions, *, checkpoint: Path
) -> dict[str, Tensor]:
    """Return the weights under our names, from those under fairseq's, as float32.

    Raises:
        UserError: One is missing, there are others besides, or what must be shared is not.
    """
    _check_versions(tensors, options, checkpoint)
    left = _modernise(tensors)
    result = {}
    for ours, theirs in _names(options):
        parts = [_take(left, name, checkpoint) for name in theirs]
        result[ours] = torch.cat(parts).float()
        for name in theirs:
            del left[name]
    embeddings = (result["encoder.embedding.tokens.weight"], result["decoder.embedding.tokens.weight"])
    shares_output = options.share_all_embeddings or options.share_decoder_input_output_embed
    output = left.pop("decoder.output_projection.weight", embeddings[1] if shares_output else None)
    if output is None:
        raise _missing(checkpoint, "decoder.output_projection.weight")
    if options.share_all_embeddings and not torch.equal(*embeddings):
        raise _outside(checkpoint, "`share_all_embeddings` is True, but its embeddings differ")
    if shares_output and not torch.equal(embeddings[1], output.float()):
        raise _outside(checkpoint, "its output projection is said to be the embedding, but differs from it")
    if left:
        raise _outside(checkpoint, f"it has the weights `{min(left)}`")
    return {**result, "output_weight": output.float()}


def _modernise(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of fairseq's releases since 2019."""
    modern = {}
    for name, tensor in tensors.items():
        if _NO_WEIGHTS.fullmatch(name):
            continue
        if match := re.fullmatch(r"(encoder|decoder)(\..*)\.layer_norms\.([0-2])\.(weight|bias)", name):
            side, layer, number, kind = match.groups()
            norms = _OLD_NORMS[side]
            name = f"{side}{layer}.{norms[min(int(number), len(norms) - 1)]}.{kind}"
        if match := re.fullmatch(r"(.*_attn\.)in_proj_(weight|bias)", name):
            for which, part in zip("qkv", tensor.chunk(3), strict=True):
                modern[f"{match[1]}{which}_proj.{match[2]}"] = part
        else:
            modern["decoder.output_projection.weight" if name == "decoder.embed_out" else name] = tensor
    return modern


def _names(options: TransformerOptions) -> Iterator[tuple[str, list[str]]]:
    """Yield each of our weights with fairseq's that it consists of, one below the other."""
    for side in ("encoder", "decoder"):
        yield f"{side}.embedding.tokens.weight", [f"{side}.embed_tokens.weight"]
        if getattr(options, f"{side}_learned_pos"):
            yield f"{side}.embedding.positions", [f"{side}.embed_positions.weight"]
        norms = [("embedding.norm", "layernorm_embedding")] if options.layernorm_embedding else []
        if getattr(options, f"{side}_normalize_before"):
            norms.append(("final_norm", "layer_norm"))
        for layer in range(getattr(options, f"{side}_layers")):
            ours, theirs = f"layers.{layer}.", f"layers.{layer}."
            for kind in ("weight", "bias"):
                attention = f"{side}.{theirs}self_attn."
                yield (
                    f"{side}.{ours}self_attention.qkv_proj.{kind}",
                    [f"{attention}{x}_proj.{kind}" for x in "qkv"],
                )
                yield f"{side}.{ours}self_attention.out_proj.{kind}", [f"{attention}out_proj.{kind}"]
                if side == "decoder":
                    attention = f"{side}.{theirs}encoder_attn."
                    cross = f"{side}.{ours}cross_attention."
                    yield f"{cross}q_proj.{kind}", [f"{attention}q_proj.{kind}"]
                    yield f"{cross}kv_proj.{kind}", [f"{attention}{x}_proj.{kind}" for x in "kv"]
                    yield f"{cross}out_proj.{kind}", [f"{attention}out_proj.{kind}"]
                yield f"{side}.{ours}feed_forward.expand.{kind}", [f"{side}.{theirs}fc1.{kind}"]
                yield f"{side}.{ours}feed_forward.contract.{kind}", [f"{side}.{theirs}fc2.{kind}"]
            around = "around_attention" if side == "encoder" else "around_self_attention"
            norms.append((f"{ours}{around}.norm", f"{theirs}self_attn_layer_norm"))
            if side == "decoder":
                norms.append((f"{ours}around_cross_attention.norm", f"{theirs}encoder_attn_layer_norm"))
            norms.append((f"{ours}around_feed_forward.norm", f"{theirs}final_layer_norm"))
        for our_norm, their_norm in norms:
            for kind in ("weight", "bias"):
                yield f"{side}.{our_norm}.{kind}", [f"{side}.{their_norm}.{kind}"]


def _check_versions(tensors: Mapping[str, Tensor], options: TransformerOptions, checkpoint: Path) -> None:
    """Old pre-norm stacks had no normalisation at their end: fairseq drops it where the version says so."""
    for side, first in (("encoder", 2), ("decoder", 3)):
        if not getattr(options, f"{side}_normalize_before"):
            continue
        version = tensors.get(f"{side}.version")
        number = 1.0 if version is None or version.numel() != 1 else float(version)
        if number < first:
            raise _outside(checkpoint, f"its {side} is pre-norm of version {number:g}, without a final norm")


def _read_settings(
    content: Mapping[str, Any], checkpoint: Path
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the settings of the model and of the task, from old `args` or new `cfg`.

    Raises:
        UserError: There are none, or the task is another than translation.
    """
    config, arguments = content.get("cfg"), content.get("args")
    if isinstance(config, dict) and isinstance(config.get("model"), dict):
        model = dict(config["model"])
        task = config["task"] if isinstance(config.get("task"), dict) else model
        task_name = task.get("_name") or model.get("task")
    elif isinstance(arguments, dict):
        model = task = dict(arguments)
        task_name = arguments.get("task")
    else:
        raise UserError(
            f"`{checkpoint}` must be a checkpoint of fairseq, but has neither `cfg` nor `args` in it."
        )
    if task_name not in (None, "translation"):
        raise _outside(checkpoint, f"its task is `{task_name}`, not translation")
    # Settings of the newest releases may be nested: encoder.embed_dim for encoder_embed_dim.
    for side in ("encoder", "decoder"):
        if isinstance(model.get(side), dict):
            model |= {f"{side}_{name}": value for name, value in model[side].items()}
    return model, task


def _languages(
    dict_dir: Path, source_lang: str | None, target_lang: str | None, *, sizes: tuple[int, int]
) -> tuple[str, str, bool]:
    """Return source and target language, and whether their order is guessed.

    They are told by the options or the checkpoint, by the names of binarised data beside the dictionaries, or
    by the sizes of the dictionaries. Where both dictionaries are equal the order changes no translation.
    """
    if source_lang and target_lang:
        return source_lang, target_lang, False
    found = sorted(path.name[len("dict.") : -len(".txt")] for path in dict_dir.glob("dict.*.txt"))
    if len(found) != 2 or not {source_lang, target_lang} <= {*found, None}:
        raise UserError(
            f"`{dict_dir}` must hold the dictionaries of two languages, dict.LANG.txt, but holds "
            f"{' and '.join(found) or 'none'}. Name them with `--source-lang` and `--target-lang`."
        )
    first, second = found
    if source_lang or target_lang:
        return (
            (first, second, False)
            if first == source_lang or second == target_lang
            else (second, first, False)
        )
    pair = find_language_pair(dict_dir)
    if pair is not None and set(pair) == set(found):
        return (*pair, False)
    vocabularies = [Vocabulary.load(dict_dir / dictionary_name(lang)) for lang in found]
    lengths = (len(vocabularies[0]), len(vocabularies[1]))
    if vocabularies[0] != vocabularies[1] and lengths[0] == lengths[1]:
        raise UserError(
            f"`{dict_dir}` must tell which language is the source, but neither it nor the checkpoint does. "
            "Name them with `--source-lang` and `--target-lang`."
        )
    if vocabularies[0] == vocabularies[1]:
        return first, second, True
    return (first, second, False) if lengths == sizes else (second, first, False)


def _load_tensors(state: Mapping[Any, Any], checkpoint: Path) -> dict[str, Tensor]:
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise UserError(
                f"`{checkpoint}` must hold named tensors as its model, but holds {type(value).__name__}."
            )
    return {name: stored.load() for name, stored in state.items()}


def _target_size(tensors: Mapping[str, Tensor], checkpoint: Path) -> int:
    return len(_take(tensors, "decoder.embed_tokens.weight", checkpoint))


def _take(tensors: Mapping[str, Tensor], name: str, checkpoint: Path) -> Tensor:
    if name not in tensors:
        raise _missing(checkpoint, name)
    return tensors[name]


def _missing(checkpoint: Path, name: str) -> UserError:
    return UserError(f"`{checkpoint}` must hold an encoder-decoder Transformer, but has no weights `{name}`.")


def _outside(checkpoint: Path, why: str) -> UserError:
    return UserError(f"`{checkpoint}` must hold a plain Transformer for translation, but {why}.")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
