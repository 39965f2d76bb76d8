"""A batch run as an update would run it, to see what it takes: memory, or work."""

import torch
from torch import nn

from nmt.checkpoints.weights import weights
from nmt.task import Batch, LossOutput

NEW_STATE = 2
"""At most this many tensors as large as all trained parameters are made for the optimizer at the first update."""


def probe(objective: nn.Module, batch: Batch, *, device: torch.device, num_copies: int) -> None:
    """Run a batch forward and backward, and change nothing: weights and statistics stay, gradients are cleared.

    Args:
        objective: Returns the `LossOutput` of a batch on the device, in the type that updates compute in.
        batch: Wherever it is.
        device: Where the objective computes.
        num_copies: How many more tensors as large as all trained parameters an update needs, for the optimizer's
            state and copies of gradients. Their memory is reserved meanwhile.
    """
    objective.train()
    parameters = dict(objective.named_parameters())
    statistics = [tensor for name, tensor in weights(objective).items() if name not in parameters]
    before = [tensor.clone() for tensor in statistics]
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    reserved = [torch.empty_like(parameter) for _ in range(num_copies) for parameter in trained]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            output: LossOutput = objective(batch.to(device))
            (output.loss / max(batch.num_targets, 1)).backward()
    finally:
        del reserved
        for parameter in parameters.values():
            parameter.grad = None
        for tensor, value in zip(statistics, before, strict=True):
            tensor.copy_(value)
