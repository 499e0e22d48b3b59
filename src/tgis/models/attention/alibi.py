"""ALiBi slopes (Press et al., arXiv:2108.12409)."""

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> Tensor:
    """One slope per head, float32 [num_heads].

    A geometric sequence for a power of two; else that of the power below, filled up with every
    second slope of the power above.
    """
    power = 1 << int(math.log2(num_heads))
    slopes = [2.0 ** (-max_bias * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-max_bias * (i + 0.5) / power) for i in range(power)]
    return torch.tensor((slopes + between)[:num_heads], dtype=torch.float32)
