"""Attention without cuDNN, which plans anew for every shape."""

import torch


def leave_out_cudnn_attention() -> None:
    """Keep PyTorch from giving attention to cuDNN in this process.

    PyTorch prefers cuDNN on recent GPUs in half precision. cuDNN's plan for a shape takes about half a second, and
    batches of sentences keep having new shapes: training in bfloat16 was six times as slow with it.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
