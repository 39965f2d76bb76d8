"""A model folder of a small untrained Transformer, for tests of what surrounds the model."""

import json
from pathlib import Path

import torch

from nmt.checkpoint import write_model_folder
from nmt.data.segmenter import read_vocabulary, train_segmenter
from nmt.models.options import TransformerOptions
from nmt.options import TrainConfig
from nmt.translation.options import TranslationOptions
from nmt.weights import weights

NOUNS = ["dog", "cat", "bird", "tree", "house"]
WORDS = ["the", "a", *NOUNS, "runs", "sleeps", "sings", "sees", "finds", "big", "small", "old", "red"]
MAX_POSITIONS = 24


def write_tiny_model(folder: Path) -> Path:
    """Write a model folder, and what it is made of beside it; the weights make for varied translations."""
    assets = folder.parent / f"{folder.name}-assets"
    assets.mkdir()
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(len(WORDS), (400, 6), generator=generator).tolist()
    sentences = [" ".join(WORDS[i] for i in row) for row in picks]
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
    task_options = TranslationOptions(data=assets, model=model_options)
    task = task_options.build(assets)
    torch.manual_seed(1)
    model = task.build_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    config = TrainConfig(task_options=task_options, save_dir=folder.parent)
    write_model_folder(folder, weights(model), config=config, task=task)
    return folder
