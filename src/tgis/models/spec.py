"""`DecoderSpec`: every way in which the decoder-only families differ, by name.

A family's table makes one from `config.json`; `decoder.py` builds the network from it. It holds no
tensors and says nothing about names in checkpoints.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

Topology = Literal["sequential", "parallel", "shared"]
"""How a block adds attention A and MLP M to its input h, with norms N:

    sequential  h' = h + A(N1(h)); h' + M(N2(h'))
    parallel    h + A(N1(h)) + M(N2(h))
    shared      h + A(N1(h)) + M(N1(h))
"""


@dataclass(frozen=True, slots=True)
class Norm:
    """Root-mean-square norm, or layer norm with or without a bias."""

    kind: Literal["rms", "layer"]
    eps: float
    bias: bool = False
    weight_offset: float = 0.0  # added to the stored weight (Gemma stores weight - 1)


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary positions on the first `dim` values of each head (RoFormer, arXiv:2104.09864)."""

    dim: int
    theta: float
    kind: str  # a key of `rotary.KINDS`
    parameters: Mapping[str, float]
    lists: Mapping[str, tuple[float, ...]]
    trained_positions: int


@dataclass(frozen=True, slots=True)
class Learned:
    """A table of position embeddings, added to the token embeddings."""

    offset: int = 0  # position p is row p + offset


@dataclass(frozen=True, slots=True)
class Alibi:
    """Scores minus slope times distance (arXiv:2108.12409)."""

    max_bias: float = 8.0
    scaled: bool = False  # the distance, too, is multiplied by the attention scale (Falcon)


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only network; sizes are those of the whole model, not of a rank's part."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm: Norm
    positions: Rotary | Learned | Alibi
    max_positions: int | None  # None: positions have no hard end
    topology: Topology = "sequential"

    qkv_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head
    qkv_clip: float | None = None  # queries, keys and values are clamped to -clip .. clip
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    windows: tuple[int | None, ...] = ()  # per layer: keys that a query sees; () = all, everywhere

    activation: Activation = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False

    embedding_multiplier: float = 1.0
    multiplies_prompts: bool = True  # whether soft prompts are multiplied too, or tokens alone
    embedding_norm: bool = False
    residual_multiplier: float = 1.0  # of what a block adds

    tied_head: bool = False
    logits_multiplier: float = 1.0

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window(self, layer: int) -> int | None:
        """How many latest keys, its own included, a query of this layer sees; None = all."""
        return self.windows[layer] if self.windows else None
