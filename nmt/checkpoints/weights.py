"""The weights of a model, by name."""

from torch import Tensor, nn


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, each tied parameter once, under its first name."""
    unique = dict(model.named_parameters())
    aliases = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if name in unique or name not in aliases
    }
