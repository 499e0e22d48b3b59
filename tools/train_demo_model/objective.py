"""What training minimises: surprise at the text and, towards the end, willingness to echo."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .network import Network
from .packing import NO_ECHO

MOST_CERTAIN = 0.999


class Objective(nn.Module):
    """The network with its two losses.

    A small model that decodes greedily falls into loops: once a few words repeat, repeating the
    next is the safest guess. The second loss is the unlikelihood of that guess wherever the
    text had the same few words before and went on differently.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, ids: Tensor, targets: Tensor, echoes: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy and echo loss, both in nats per token."""
        scores = functional.log_softmax(self.network(ids, cos, sin), dim=-1)
        surprise = -scores.gather(-1, targets.unsqueeze(-1)).mean()
        echo = scores.gather(-1, echoes.unsqueeze(-1)).squeeze(-1).exp().clamp(max=MOST_CERTAIN)
        unlikelihood = torch.where(echoes == NO_ECHO, 0.0, -torch.log1p(-echo)).mean()
        return surprise, unlikelihood
