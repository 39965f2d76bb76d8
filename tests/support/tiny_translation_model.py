"""A model folder of a small untrained Transformer, for tests of what surrounds the model."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nmt.checkpoints.model_folder import write_model_folder
from nmt.checkpoints.weights import weights
from nmt.data.parallel_dataset import collate_pairs
from nmt.data.segmenter import read_vocabulary, train_segmenter
from nmt.data.vocabulary import EOS_ID
from nmt.models.options import TransformerOptions
from nmt.options import TrainConfig
from nmt.translation.options import TranslationOptions
from nmt.translation.task import TranslationTask

NOUNS = ["dog", "cat", "bird", "tree", "house"]
WORDS = ["the", "a", *NOUNS, "runs", "sleeps", "sings", "sees", "finds", "big", "small", "old", "red"]
MAX_POSITIONS = 24


def write_tiny_model(folder: Path) -> Path:
    """Write a model folder, and what it is made of beside it; the weights make for varied translations."""
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(len(WORDS), (400, 6), generator=generator).tolist()
    task = _make_task(folder, [" ".join(WORDS[i] for i in row) for row in picks])
    torch.manual_seed(1)
    model = task.build_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return _write(folder, model, task)


def write_learned_model(
    folder: Path, pairs: Mapping[str, str], variant: Mapping[str, Any] | None = None
) -> Path:
    """Write a model folder of a model that has learned some sentences and their translations by heart.

    `variant` changes fields of its `TransformerOptions`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    task = _make_task(folder, [*pairs, *pairs.values()] * 10, variant)
    torch.manual_seed(1)
    model = task.build_model()
    sources, targets = (
        [np.append(ids, EOS_ID) for ids in segmenter.encode(list(texts))]
        for segmenter, texts in ((task.source_segmenter, pairs), (task.target_segmenter, pairs.values()))
    )
    batch = collate_pairs(list(zip(sources, targets, strict=True)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        loss = task.compute_loss(model, batch).loss / batch.num_targets
        loss.backward()
        optimizer.step()
    return _write(folder, model, task)


def _make_task(
    folder: Path, sentences: Sequence[str], variant: Mapping[str, Any] | None = None
) -> TranslationTask:
    """Make vocabularies of the sentences in a folder beside the model's, and the task of a small model."""
    assets = folder.parent / f"{folder.name}-assets"
    assets.mkdir()
    train_segmenter(
        sentences, assets / "sentencepiece.model", vocab_size=330, model_type="bpe", character_coverage=1.0
    )
    for language in ("en", "de"):
        read_vocabulary(assets / "sentencepiece.model").save(assets / f"dict.{language}.txt")
    (assets / "languages.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de"}))
    model_options = TransformerOptions(
        encoder_layers=1,
        decoder_layers=1,
        encoder_embed_dim=16,
        decoder_embed_dim=16,
        encoder_ffn_embed_dim=32,
        decoder_ffn_embed_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_source_positions=MAX_POSITIONS,
        max_target_positions=MAX_POSITIONS,
    )
    model_options = dataclasses.replace(model_options, **(variant or {}))
    return TranslationOptions(data=assets, model=model_options).build(assets)


def _write(folder: Path, model: nn.Module, task: TranslationTask) -> Path:
    config = TrainConfig(task_options=task.options, save_dir=folder.parent)
    write_model_folder(folder, weights(model), config=config, task=task)
    return folder
