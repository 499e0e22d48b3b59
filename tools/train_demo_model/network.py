"""The LLaMA decoder, written for training speed on CPUs: fused projections, one file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NORM_EPS = 1e-5
ROPE_THETA = 10_000.0
INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """Everything that fixes the network's parameters."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    context: int

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def projections(self) -> tuple[int, int, int]:
        """Widths of the query, key and value parts of the fused projection."""
        kv_width = self.kv_heads * self.head_size
        return self.heads * self.head_size, kv_width, kv_width


def rotary_tables(shape: Shape, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (length, head_size / 2)."""
    exponents = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
    angles = torch.outer(torch.arange(length, dtype=torch.float32), ROPE_THETA**-exponents)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each (first half, second half) pair of features by its position's angle."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    """Pre-norm attention and gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.attention_norm = nn.Parameter(torch.ones(shape.hidden))
        self.qkv = nn.Linear(shape.hidden, sum(shape.projections), bias=False)
        self.attention_out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(shape.hidden))
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(rows, context, hidden) to the same."""
        x = x + self._attend(
            functional.rms_norm(x, x.shape[-1:], self.attention_norm, NORM_EPS), cos, sin
        )
        normed = functional.rms_norm(x, x.shape[-1:], self.mlp_norm, NORM_EPS)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        output: Tensor = x + self.down(functional.silu(gate) * up)
        return output

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        query, key, value = (
            part.view(rows, length, -1, self.shape.head_size).transpose(1, 2)
            for part in self.qkv(x).split(self.shape.projections, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(
            rotate(query, cos, sin).to(value.dtype),
            rotate(key, cos, sin).to(value.dtype),
            value,
            is_causal=True,
            enable_gqa=True,
        )
        output: Tensor = self.attention_out(mixed.transpose(1, 2).reshape(rows, length, -1))
        return output


class Network(nn.Module):
    """Embedding, blocks, and the embedding again as output layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.final_norm = nn.Parameter(torch.ones(shape.hidden))
        self._initialise()

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Logits in float32, (rows, context, vocabulary)."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        normed = functional.rms_norm(x, x.shape[-1:], self.final_norm, NORM_EPS)
        return functional.linear(normed, self.embedding.weight).float()

    def _initialise(self) -> None:
        # The residual branches start smaller, so that depth does not inflate the stream.
        residual_std = INIT_STD / (2 * self.shape.layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            residual = name.endswith(("attention_out.weight", "down.weight"))
            nn.init.normal_(parameter, std=residual_std if residual else INIT_STD)
