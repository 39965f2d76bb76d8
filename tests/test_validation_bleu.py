"""BLEU at validation: of the weights that the model has then, by the engine that translates for users."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.in_memory import Side
from support.tiny_translation_model import WORDS, write_tiny_model

from nmt.checkpoints.weights import weights
from nmt.data.parallel_dataset import ParallelDataset
from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.distributed import single
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.models.inference import InferenceTransformer
from nmt.models.transformer import Transformer
from nmt.translation import task as task_module
from nmt.translation.scoring import bleu
from nmt.translation.translator import Translator
from nmt.update.weight_average import AveragedWeights

CPU = torch.device("cpu")
LINES = [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]) for i in range(12)]


@pytest.fixture
def translator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Translator:
    loaded = Translator.load(write_tiny_model(tmp_path / "model"))
    monkeypatch.setitem(vars(loaded.task), "_data_directory", SimpleNamespace(has_raw_text=False))
    return loaded


def translate_slowly(translator: Translator, model: Transformer) -> list[str]:
    """Translate sentence by sentence with the plain model."""
    generator = Generator([model], DecodingOptions(beam=5), pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID)
    ids = [np.append(x, EOS_ID) for x in translator.task.source_segmenter.encode(LINES)]
    found = [generator.generate(torch.from_numpy(x).long()[None])[0][0].tokens for x in ids]
    return translator.task.target_segmenter.decode(found)


def examples_of(translator: Translator, references: list[str]) -> ParallelDataset:
    encode = translator.task.source_segmenter.encode
    sides = [Side([np.append(ids, EOS_ID) for ids in encode(texts)]) for texts in (LINES, references)]
    return ParallelDataset(*sides)


def test_bleu_is_of_the_weights_that_the_model_has_when_it_is_asked(translator: Translator) -> None:
    model = translator.models[0]
    mean = AveragedWeights(weights(model), decay=0.9)
    before = translate_slowly(translator, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    after = translate_slowly(translator, model)
    assert after != before
    examples = examples_of(translator, before)
    references = translator.task.target_segmenter.decode(
        [target for _, target in map(examples.__getitem__, range(12))]
    )

    def evaluate() -> float:
        return translator.task.evaluate(model, examples, single(CPU))["bleu"]

    expected = [bleu(texts, references, target_lang="de").score for texts in (after, before)]
    assert expected[0] < expected[1]
    found = [evaluate()]
    with mean.in_place():  # as at validation with `ema-decay`
        found.append(evaluate())
    assert found == expected
    assert evaluate() == expected[0]


def test_validation_translates_with_the_fast_model(
    translator: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    class Recorded(Generator):
        def __init__(self, models: Any, *arguments: Any, **options: Any) -> None:
            asked.extend(models)
            super().__init__(models, *arguments, **options)

    monkeypatch.setattr(task_module, "Generator", Recorded)
    translator.task.evaluate(translator.models[0], examples_of(translator, LINES), single(CPU))
    assert [type(model) for model in asked] == [InferenceTransformer]
