"""What an update differentiates: the model together with the task's loss."""

from typing import Any

from torch import nn

from nmt.task import Batch, LossOutput, Task


class Objective(nn.Module):
    """Returns the loss of a batch. DDP and FSDP wrap it, not the model.

    So a task may use the model in any way: only the encoder, features without logits, two passes.
    """

    def __init__(self, task: Task[Any], model: nn.Module) -> None:
        super().__init__()
        self.task = task
        self.model = model

    def forward(self, batch: Batch) -> LossOutput:
        """Return the task's loss of a batch."""
        return self.task.compute_loss(self.model, batch)
