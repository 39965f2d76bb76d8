"""Random numbers without a state: each is a hash of its seed, line, sample and step, so no batch can change it.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), applied after each value that enters.
int64 arithmetic wraps around on all devices, like the unsigned arithmetic of the original.
"""

import torch
from torch import Tensor

_STEP = -7046029254386353131  # 0x9e3779b97f4a7c15, the odd number nearest to 2**64 / golden ratio
_FACTORS = (-4658895280553007687, -7723592293110705685)  # 0xbf58476d1ce4e5b9, 0x94d049bb133111eb
_BITS = 40  # of a random number; few enough that its product with a total stays below the total


def start_streams(seed: int, lines: Tensor, num_samples: int) -> Tensor:
    """Return a stream of random numbers for each sample of each line: (B,) int64 -> (B*num_samples,)."""
    samples = torch.arange(num_samples, device=lines.device)
    of_lines = _absorb(_absorb(torch.zeros_like(lines), seed), lines)  # (B,)
    return _absorb(of_lines[:, None], samples).flatten()


def uniform(streams: Tensor, step: int | Tensor) -> Tensor:
    """Return the number at place `step` of each stream: (B,) float64 from 0 to 1, 1 excluded.

    On devices without float64 (Apple's) it is float32.
    """
    dtype, num_bits = (torch.float32, 24) if streams.device.type == "mps" else (torch.float64, _BITS)
    return _shift_right(_absorb(streams, step), 64 - num_bits).to(dtype) * 2.0**-num_bits


def _absorb(state: Tensor, value: Tensor | int) -> Tensor:
    x = (state ^ value) + _STEP
    x = (x ^ _shift_right(x, 30)) * _FACTORS[0]
    x = (x ^ _shift_right(x, 27)) * _FACTORS[1]
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, num_bits: int) -> Tensor:
    """Shift in zeros from the left; `>>` would shift in the sign."""
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)
