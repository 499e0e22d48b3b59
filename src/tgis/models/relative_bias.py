"""T5's relative position bias as a table over distances."""

import math

import torch
from torch import Tensor


def buckets(distance: Tensor, num_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """The bucket of each distance (T5, arXiv:1910.10683, section 2.1).

    Half of a direction's buckets hold one distance each; the rest widen logarithmically up to
    `max_distance`, and everything beyond shares the last one.

    Args:
        distance: key position minus query position, int64 [...].
        num_buckets: shared by both directions if bidirectional; else positive distances count as 0.
    """
    first = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0) * num_buckets
        away = distance.abs()
    else:
        away = (-distance).clamp_min(0)
    num_exact = num_buckets // 2
    ratio = torch.log(away.clamp_min(1).float() / num_exact) / math.log(max_distance / num_exact)
    wide = num_exact + (ratio * (num_buckets - num_exact)).long()
    return first + torch.where(away < num_exact, away, wide.clamp_max(num_buckets - 1))


def bias_table(weight: Tensor, max_distance: int, bidirectional: bool) -> Tensor:
    """The bias of every head at every distance.

    Args:
        weight: [num_buckets, heads].

    Returns:
        float32 [heads, 2 * max_distance + 1]; column max_distance is distance 0. Distances beyond
        either end have the bias of that end.
    """
    distance = torch.arange(-max_distance, max_distance + 1)
    rows = buckets(distance, weight.shape[0], max_distance, bidirectional)
    return weight.float()[rows].T.contiguous()
