"""fairseq's Transformer, written down once more over a plain dict of its weights, and its checkpoints.

Sources: fairseq/models/transformer (encoder, decoder), modules/transformer_layer.py, multihead_attention.py,
sinusoidal_positional_embedding.py, learned_positional_embedding.py. One sentence at a time, no padding.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN: dict[str, Any] = {
    "task": "translation",
    "arch": "transformer",
    "source_lang": "en",
    "target_lang": "de",
    "encoder_embed_dim": 8,
    "encoder_ffn_embed_dim": 12,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_normalize_before": False,
    "encoder_learned_pos": False,
    "decoder_embed_dim": 8,
    "decoder_ffn_embed_dim": 10,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_normalize_before": False,
    "decoder_learned_pos": False,
    "share_all_embeddings": False,
    "share_decoder_input_output_embed": False,
    "layernorm_embedding": False,
    "no_scale_embedding": False,
    "activation_fn": "relu",
    "max_source_positions": 20,
    "max_target_positions": 30,
}


def make_weights(settings: dict[str, Any], *, source_size: int, target_size: int) -> dict[str, Tensor]:
    """Draw weights under fairseq's names."""
    generator = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {}

    def draw(name: str, *shape: int) -> None:
        state[name] = 0.5 * torch.randn(shape, generator=generator)

    def linear(name: str, inputs: int, outputs: int) -> None:
        draw(f"{name}.weight", outputs, inputs)
        draw(f"{name}.bias", outputs)

    def norm(name: str, dim: int) -> None:
        draw(f"{name}.weight", dim)
        draw(f"{name}.bias", dim)

    for side, size in (("encoder", source_size), ("decoder", target_size)):
        dim, ffn_dim = settings[f"{side}_embed_dim"], settings[f"{side}_ffn_embed_dim"]
        state[f"{side}.version"] = torch.tensor([3.0])
        draw(f"{side}.embed_tokens.weight", size, dim)
        if settings[f"{side}_learned_pos"]:
            positions = settings["max_source_positions" if side == "encoder" else "max_target_positions"]
            draw(f"{side}.embed_positions.weight", positions + 2, dim)
        if settings["layernorm_embedding"]:
            norm(f"{side}.layernorm_embedding", dim)
        for layer in range(settings[f"{side}_layers"]):
            name = f"{side}.layers.{layer}"
            for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
                linear(f"{name}.self_attn.{projection}", dim, dim)
            norm(f"{name}.self_attn_layer_norm", dim)
            if side == "decoder":
                for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
                    inputs = settings["encoder_embed_dim"] if projection[0] in "kv" else dim
                    linear(f"{name}.encoder_attn.{projection}", inputs, dim)
                norm(f"{name}.encoder_attn_layer_norm", dim)
            linear(f"{name}.fc1", dim, ffn_dim)
            linear(f"{name}.fc2", ffn_dim, dim)
            norm(f"{name}.final_layer_norm", dim)
        if settings[f"{side}_normalize_before"]:
            norm(f"{side}.layer_norm", dim)
    if settings["share_all_embeddings"]:
        state["decoder.embed_tokens.weight"] = state["encoder.embed_tokens.weight"]
    if settings["share_all_embeddings"] or settings["share_decoder_input_output_embed"]:
        state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    else:
        draw("decoder.output_projection.weight", target_size, settings["decoder_embed_dim"])
    return state


def logits(
    state: dict[str, Tensor], settings: dict[str, Any], source: Tensor, target_input: Tensor
) -> Tensor:
    """Return (T, V) for ids (S,) and (T,)."""
    encoded = _stack("encoder", state, settings, source, None)
    decoded = _stack("decoder", state, settings, target_input, encoded)
    return decoded @ state["decoder.output_projection.weight"].T


def _stack(
    side: str, state: dict[str, Tensor], settings: dict[str, Any], ids: Tensor, encoded: Tensor | None
) -> Tensor:
    dim, num_heads = settings[f"{side}_embed_dim"], settings[f"{side}_attention_heads"]
    pre_norm = settings[f"{side}_normalize_before"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (dim,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def attend(x: Tensor, memory: Tensor, name: str, causal: bool) -> Tensor:
        head_dim = dim // num_heads
        queries = linear(x, f"{name}.q_proj") * head_dim**-0.5
        keys, values = linear(memory, f"{name}.k_proj"), linear(memory, f"{name}.v_proj")
        heads = []
        for head in range(num_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            scores = queries[:, part] @ keys[:, part].T
            if causal:
                scores = scores + torch.full_like(scores, -math.inf).triu(1)
            heads.append(scores.softmax(dim=-1) @ values[:, part])
        return linear(torch.cat(heads, dim=1), f"{name}.out_proj")

    def around(x: Tensor, block: Any, name: str) -> Tensor:
        return x + block(norm(x, name)) if pre_norm else norm(x + block(x), name)

    scale = 1.0 if settings["no_scale_embedding"] else math.sqrt(dim)
    x = scale * state[f"{side}.embed_tokens.weight"][ids]
    positions = range(2, 2 + len(ids))
    if settings[f"{side}_learned_pos"]:
        x = x + state[f"{side}.embed_positions.weight"][list(positions)]
    else:
        half = dim // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        angles = torch.tensor(positions)[:, None] * frequencies
        x = x + torch.cat([angles.sin(), angles.cos()], dim=1)
    if settings["layernorm_embedding"]:
        x = norm(x, f"{side}.layernorm_embedding")
    activation = {"relu": F.relu, "gelu": F.gelu}[settings["activation_fn"]]
    for layer in range(settings[f"{side}_layers"]):
        name = f"{side}.layers.{layer}"
        is_decoder = encoded is not None
        x = around(
            x,
            lambda y, name=name, causal=is_decoder: attend(y, y, f"{name}.self_attn", causal),
            f"{name}.self_attn_layer_norm",
        )
        if encoded is not None:
            x = around(
                x,
                lambda y, name=name, memory=encoded: attend(y, memory, f"{name}.encoder_attn", False),
                f"{name}.encoder_attn_layer_norm",
            )
        x = around(
            x,
            lambda y, name=name: linear(activation(linear(y, f"{name}.fc1")), f"{name}.fc2"),
            f"{name}.final_layer_norm",
        )
    return norm(x, f"{side}.layer_norm") if pre_norm else x


def under_old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as releases before 2019 named them."""
    old: dict[str, Tensor] = {"encoder.embed_positions._float_tensor": torch.zeros(1)}
    norms = {
        "encoder": {"self_attn_layer_norm": 0, "final_layer_norm": 1},
        "decoder": {"self_attn_layer_norm": 0, "encoder_attn_layer_norm": 1, "final_layer_norm": 2},
    }
    for name, tensor in state.items():
        side = name.partition(".")[0]
        for norm, number in norms[side].items():
            name = name.replace(f".{norm}.", f".layer_norms.{number}.")
        stem, _, kind = name.rpartition(".")
        if stem.endswith(".q_proj"):
            stem = stem.removesuffix("q_proj")
            parts = [state[f"{stem}{x}_proj.{kind}"] for x in "qkv"]
            old[f"{stem}in_proj_{kind}"] = torch.cat(parts)
        elif name == "decoder.output_projection.weight":
            if tensor is not state["decoder.embed_tokens.weight"]:
                old["decoder.embed_out"] = tensor
        elif not stem.endswith((".k_proj", ".v_proj")):
            old[name] = tensor
    return old


def write_dictionaries(folder: Path, *, source_size: int, target_size: int) -> None:
    """Write dict.en.txt and dict.de.txt of these sizes, the four special ones counted."""
    for lang, size in (("en", source_size), ("de", target_size)):
        lines = [f"w{i} {100 - i}\n" for i in range(size - 5)] + ["madeupword0000 0\n"]
        (folder / f"dict.{lang}.txt").write_text("".join(lines), encoding="utf-8")


def checkpoint(settings: dict[str, Any], state: dict[str, Tensor], *, old: bool = False) -> dict[str, Any]:
    """Return what fairseq saves, with `args` as until 2020 or `cfg` as since."""
    if old:
        return {"args": argparse.Namespace(**settings), "model": state, "extra_state": {"val_loss": 1.0}}
    model = argparse.Namespace(**settings)
    task = {"_name": "translation", **{key: settings.get(key) for key in ("source_lang", "target_lang")}}
    return {"args": None, "cfg": {"_name": None, "model": model, "task": task}, "model": state}
