"""Convert fairseq's translation models to model folders.

Only the `transformer` family of the task `translation` can be converted. Its settings are in the checkpoint, as
`args` (until 2020) or `cfg` (later). Names and meanings are those of fairseq's models/transformer. fairseq itself
is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nmt.checkpoints.model_folder import write_model_folder
from nmt.checkpoints.weights import weights
from nmt.data.data_directory import dictionary_name, find_language_pair
from nmt.data.vocabulary import Vocabulary
from nmt.errors import UserError, shown
from nmt.interop.fairseq_settings import outside, read_options, read_settings
from nmt.interop.safe_unpickle import StoredTensor, read_torch_file
from nmt.interop.stored_zip import NAME_ANOTHER
from nmt.models.options import TransformerOptions
from nmt.options import TrainConfig
from nmt.task import Task
from nmt.translation.assets import TranslationAssets
from nmt.translation.options import TranslationOptions
from nmt.translation.task import TranslationTask

_EMBEDDINGS = (  # one matrix may be stored under several of these names
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.output_projection.weight",
)
# Entries of checkpoints that are not weights: versions, and sinusoids of old releases.
_NO_WEIGHTS = re.compile(r"(encoder|decoder)\.(version|embed_positions\.(_float_tensor|weights))")
_OLD_NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}


@dataclass(frozen=True)
class Conversion:
    """A report on the converted model."""

    options: TransformerOptions
    source_lang: str
    target_lang: str
    num_parameters: int
    is_guessed: bool  # whether it was guessed which of the two languages is the source


def convert_checkpoint(
    checkpoint: Path, dict_dir: Path, output: Path, *, source_lang: str | None, target_lang: str | None
) -> Conversion:
    """Write a model folder that computes the same as a fairseq checkpoint.

    Args:
        checkpoint: A file of fairseq's, such as checkpoint_best.pt.
        dict_dir: Holds `dict.<lang>.txt` of both languages.
        output: The model folder to write; it must not exist.
        source_lang: Needed only if neither the checkpoint nor the file names in `dict_dir` tell it.
        target_lang: As `source_lang`.

    Raises:
        UserError: The checkpoint cannot be read, or its model is not of this family; the first reason is named.
    """
    content = read_torch_file(checkpoint)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(
            f"`{checkpoint}` must be a checkpoint of fairseq, but has no `model` in it. {NAME_ANOTHER}"
        )
    settings, task_settings = read_settings(content, checkpoint)
    options = read_options(settings, checkpoint)
    stored = _stored_tensors(content["model"], checkpoint)
    sizes = (_vocabulary_size(stored, "encoder", checkpoint), _vocabulary_size(stored, "decoder", checkpoint))
    source, target, is_guessed = _languages(
        dict_dir,
        source_lang or task_settings.get("source_lang") or None,
        target_lang or task_settings.get("target_lang") or None,
        sizes=sizes,
    )
    assets = TranslationAssets(source, target, folder=dict_dir, segmenter=None)
    task = TranslationTask(TranslationOptions(data=dict_dir, model=options, eval_bleu=False), assets)
    for lang, vocabulary, size in zip(
        (source, target), (task.source_vocabulary, task.target_vocabulary), sizes, strict=True
    ):
        if len(vocabulary) != size:
            raise UserError(
                f"`{dict_dir / dictionary_name(lang)}` must have {size:,} types (special ones included) for "
                f"`{checkpoint}`, but has {len(vocabulary):,}. Name the folder of the model's own dictionaries."
            )
    _check_layers(stored, options, checkpoint)
    with torch.device("meta"):
        model = task.build_model()
    _check_sizes(stored, model, options, checkpoint)
    available = convert_tensors(_load_tensors(stored), options, checkpoint=checkpoint)
    converted = {name: available[name] for name in weights(model)}  # tied weights once
    config = TrainConfig(task_options=task.options, save_dir=output)
    write_model_folder(output, converted, config=config, task=cast(Task[Any], task))
    return Conversion(options, source, target, sum(x.numel() for x in converted.values()), is_guessed)


def convert_tensors(
    tensors: Mapping[str, Tensor], options: TransformerOptions, *, checkpoint: Path
) -> dict[str, Tensor]:
    """Return fairseq's weights under our names, as float32.

    Raises:
        UserError: A weight is missing, there are unknown ones, or weights that must be shared are different.
    """
    _check_versions(tensors, options, checkpoint)
    left = _modernise(tensors, checkpoint)
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
        raise outside(checkpoint, "`share_all_embeddings` is True, but its embeddings differ")
    if shares_output and not torch.equal(embeddings[1], output.float()):
        raise outside(checkpoint, "its output projection is said to be the embedding, but differs from it")
    if left:
        raise outside(checkpoint, f"it has the weights `{min(left)}`")
    return {**result, "output_weight": output.float()}


def _modernise(tensors: Mapping[str, Tensor], checkpoint: Path) -> dict[str, Tensor]:
    """Return the weights under the names of fairseq's releases since 2019.

    Raises:
        UserError: A matrix of query, key and value cannot be divided into three parts.
    """
    modern = {}
    for name, tensor in tensors.items():
        if _NO_WEIGHTS.fullmatch(name):
            continue
        if match := re.fullmatch(r"(encoder|decoder)(\..*)\.layer_norms\.([0-2])\.(weight|bias)", name):
            side, layer, number, kind = match.groups()
            norms = _OLD_NORMS[side]
            name = f"{side}{layer}.{norms[min(int(number), len(norms) - 1)]}.{kind}"
        if match := re.fullmatch(r"(.*_attn\.)in_proj_(weight|bias)", name):
            if tensor.dim() == 0 or tensor.size(0) == 0 or tensor.size(0) % 3:
                raise _other_shape(checkpoint, name, "three parts of one size", tensor.shape)
            for which, part in zip("qkv", tensor.chunk(3), strict=True):
                modern[f"{match[1]}{which}_proj.{match[2]}"] = part
        else:
            modern["decoder.output_projection.weight" if name == "decoder.embed_out" else name] = tensor
    return modern


def _names(options: TransformerOptions) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each of our weights, and the names of fairseq's weights that are stacked to make it."""
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
    """Refuse old pre-norm stacks without a normalisation at their end; fairseq's version number shows them."""
    for side, first in (("encoder", 2), ("decoder", 3)):
        if not getattr(options, f"{side}_normalize_before"):
            continue
        version = tensors.get(f"{side}.version")
        number = 1.0 if version is None or version.numel() != 1 else float(version)
        if number < first:
            raise outside(checkpoint, f"its {side} is pre-norm of version {number:g}, without a final norm")


def _languages(
    dict_dir: Path, source_lang: str | None, target_lang: str | None, *, sizes: tuple[int, int]
) -> tuple[str, str, bool]:
    """Return source and target language, and whether their order is guessed.

    The order comes from the options or the checkpoint, from the names of binarised data beside the dictionaries,
    or from the sizes of the dictionaries. If both dictionaries are equal, the order changes no translation.
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


def _stored_tensors(state: Mapping[Any, Any], checkpoint: Path) -> dict[str, StoredTensor]:
    """Return the tensors of the model, not yet read.

    Raises:
        UserError: There is something else among them.
    """
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise UserError(
                f"`{checkpoint}` must hold named tensors as its model, but holds {type(value).__name__}. "
                f"{NAME_ANOTHER}"
            )
    return dict(state)


def _vocabulary_size(tensors: Mapping[str, StoredTensor], side: str, checkpoint: Path) -> int:
    name = f"{side}.embed_tokens.weight"
    if name not in tensors:
        raise _missing(checkpoint, name)
    if len(tensors[name].shape) != 2:
        raise _other_shape(checkpoint, name, "two dimensions", tensors[name].shape)
    return tensors[name].shape[0]


def _check_layers(stored: Mapping[str, StoredTensor], options: TransformerOptions, checkpoint: Path) -> None:
    """Raise `UserError` if the settings want more layers than there are, before time is spent on making them."""
    for side in ("encoder", "decoder"):
        found = {match[1] for name in stored if (match := re.match(rf"{side}\.layers\.(\d+)\.", name))}
        for number in range(getattr(options, f"{side}_layers")):
            if str(number) not in found:
                raise _missing(checkpoint, f"{side}.layers.{number}.self_attn.q_proj.weight")


def _check_sizes(
    stored: Mapping[str, StoredTensor],
    model: nn.Module,
    options: TransformerOptions,
    checkpoint: Path,
) -> None:
    """Raise `UserError` unless the file has the tensors that the settings want; reads none of them."""
    found = {name: torch.empty(x.shape, dtype=x.storage.dtype, device="meta") for name, x in stored.items()}
    modern = _modernise(found, checkpoint)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    names = [*_names(options)]
    if "decoder.output_projection.weight" in modern:
        names.append(("output_weight", ["decoder.output_projection.weight"]))
    for ours, theirs in names:
        rows, *columns = shapes[ours]
        for name in theirs:
            part = (rows // len(theirs), *columns)
            if tuple(_take(modern, name, checkpoint).shape) != part:
                raise _other_shape(checkpoint, name, f"the shape {part}, by its settings", modern[name].shape)
    used = {
        id(stored[name].storage): stored[name].storage for name in stored if not _NO_WEIGHTS.fullmatch(name)
    }
    kept = [name for name in modern if name not in _EMBEDDINGS]
    num_stored = sum(storage.num_elements for storage in used.values())
    if sum(modern[name].numel() for name in kept) > num_stored:
        raise outside(checkpoint, "many of its weights are views of the same numbers")


def _load_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Read the tensors. Tensors that share their storage are read once."""
    loaded: dict[tuple[object, ...], Tensor] = {}
    tensors = {}
    for name, x in stored.items():
        if _NO_WEIGHTS.fullmatch(name) and not name.endswith(".version"):
            continue
        key = (id(x.storage), x.offset, x.shape, x.stride)
        if key not in loaded:
            loaded[key] = x.load()
        tensors[name] = loaded[key]
    return tensors


def _take(tensors: Mapping[str, Tensor], name: str, checkpoint: Path) -> Tensor:
    if name not in tensors:
        raise _missing(checkpoint, name)
    return tensors[name]


def _other_shape(checkpoint: Path, name: str, rule: str, shape: Sequence[int]) -> UserError:
    return UserError(
        f"`{checkpoint}`: `{name}` must have {rule}, but is {shown(tuple(shape))}. {NAME_ANOTHER}"
    )


def _missing(checkpoint: Path, name: str) -> UserError:
    return UserError(
        f"`{checkpoint}` must hold an encoder-decoder Transformer, but has no weights `{name}`. {NAME_ANOTHER}"
    )
