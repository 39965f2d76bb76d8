"""Attention without cuDNN, which plans anew for every shape."""

import torch


def leave_out_cudnn_attention() -> None:
    """Keep PyTorch from giving attention to cuDNN in this process.

    It is what PyTorch takes first on recent GPUs in half precision. Its plan for a shape takes about half a
    second, and batches of sentences have ever new shapes: training in bfloat16 was six times as slow with it.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
