"""Sentences of ids as a batch, and a plain search for their translations."""

import torch

from nmt.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from nmt.generation.beam_search import Hypothesis
from nmt.generation.generator import Generator
from nmt.generation.options import DecodingOptions
from nmt.models.protocols import SearchModel


def search(model: SearchModel, sentences: list[list[int]], beam: int) -> list[list[Hypothesis]]:
    options = DecodingOptions(beam=beam, nbest=beam, max_len_a=0, max_len_b=30)
    generator = Generator([model], options, pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID)
    return generator.generate(padded(sentences))


def padded(sentences: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, sentences))
    return torch.tensor([[*x, EOS_ID] + [PAD_ID] * (longest - len(x)) for x in sentences])
