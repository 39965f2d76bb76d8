"""What an update differentiates: the model together with the task's loss."""

from typing import Any

from torch import nn

from nmt.task import Batch, LossOutput, Task


class Objective(nn.Module):
    """What is called with a batch and returns its loss. It is what DDP and FSDP wrap.

    So a task may use the model in any way: encode alone, features without logits, twice.
    """

    def __init__(self, task: Task[Any], model: nn.Module) -> None:
        super().__init__()
        self.task = task
        self.model = model

    def forward(self, batch: Batch) -> LossOutput:
        """Return the task's loss of a batch."""
        return self.task.compute_loss(self.model, batch)
