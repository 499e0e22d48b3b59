"""LoRA on top of a network's layers (arXiv:2106.09685): y += x A' B', each row with its adapter.

A rank's part of an adapter follows from how a layer was put together from the checkpoint's
weights: it takes those rows of B and those columns of A that it has taken of the weight. So fused
projections, odd layouts and splits over ranks need nothing of their own, and what a rank adds to
its part of a sum is completed with the sum.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tgis.models import kernels
from tgis.models.kernels import low_rank_reference
from tgis.models.kernels.low_rank_reference import Adapter, Pair, Site
from tgis.models.parallel import Shard
from tgis.quant.linear import Linear, LinearSource, Piece

SAMPLE_ROWS = 8

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""Name of a checkpoint's weight -> A [rank, in], B [out, rank], with the scale multiplied in."""


class Target(NamedTuple):
    """A weight [out, in] to which LoRA may add; embeddings count as [hidden, vocab]."""

    name: str
    out_features: int
    in_features: int
    is_embedding: bool = False
    sample: Tensor | None = None  # first rows of the stored weight, of embeddings and heads


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoraAdapter:
    """One adapter on this rank."""

    packed: Adapter
    embedding: Pair | None  # A' [vocab, rank], B' [rank, hidden]

    @property
    def address(self) -> int:
        """By which rows name it as long as it lives; not 0."""
        return self.packed.address


class Adaptable:
    """A layer to whose output adapters may add.

    Args:
        site: its number among the layers of the network.
        widths: output features of its parts.
    """

    def __init__(self, layer: Linear, ops: ModuleType, site: int, widths: tuple[int, ...]) -> None:
        self.layer = layer
        self._ops = ops
        self._site = site
        self._widths = widths

    def __call__(self, x: Tensor, lora: Tensor | None = None) -> Tensor:
        """Rows [n, in] -> [n, out].

        Args:
            lora: int64 [n], the address of each row's adapter, 0: none; None: no row has one.
        """
        y = self.layer(x)
        if lora is not None:
            self._ops.add_(y, x, lora, self._site, self._widths)
        return y


class LoraSites:
    """The layers of this rank's network to which adapters may add.

    Args:
        dtype: of the network.
        prefixes: one of them precedes the names of all weights but the head's; adapters may have
            been trained with another.
        device: of the network.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        shard: Shard,
        prefixes: tuple[str, ...] = ("",),
        device: torch.device | None = None,
    ) -> None:
        self._device = device or torch.device("cpu")
        known = self._device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
        self._ops: ModuleType = kernels.low_rank if known else low_rank_reference
        self._dtype = dtype
        self._is_first = shard.rank == 0
        self._prefixes = sorted(prefixes, key=len, reverse=True)
        self._sites: list[tuple[LinearSource, torch.dtype]] = []
        self._embedding: Target | None = None
        self.targets: dict[str, Target] = {}  # by every name that an adapter may use
        # Those of the adapters in use that add to embeddings.
        self._embedded: WeakValueDictionary[int, LoraAdapter] = WeakValueDictionary()

    def layer(
        self, layer: Linear, source: LinearSource, dtype: torch.dtype | None = None
    ) -> Adaptable:
        """A layer that was loaded from `source`.

        Args:
            dtype: of its input, if that is not the network's.
        """
        for piece in source.pieces:
            self._know(Target(piece.name, *piece.shape), self._aliases(piece.name))
        return self._adaptable(layer, source, dtype or self._dtype)

    def head(
        self, layer: Linear, source: LinearSource, names: tuple[str, ...], sample: Tensor | None
    ) -> Adaptable:
        """The layer from hidden to float32 logits, known by any of `names`."""
        (piece,) = source.pieces
        self._know(Target(piece.name, *piece.shape, sample=sample), (piece.name, *names))
        return self._adaptable(layer, source, self._dtype)

    def embedding(self, name: str, shape: tuple[int, int], sample: Tensor) -> None:
        """The table [vocab, hidden] of all ranks; the first one adds to all of it."""
        self._embedding = Target(name, *shape[::-1], is_embedding=True, sample=sample)
        self._know(self._embedding, self._aliases(name))

    def attach(self, pairs: Pairs) -> LoraAdapter:
        """This rank's part of an adapter, whose names and shapes are those of targets."""
        pairs = {name: (a.to(self._device), b.to(self._device)) for name, (a, b) in pairs.items()}
        embedding = None
        if self._is_first and self._embedding is not None and self._embedding.name in pairs:
            a, b = pairs[self._embedding.name]
            embedding = Pair(a.T.contiguous(), b.T.contiguous())
        packed = self._ops.Adapter([_site(source, dtype, pairs) for source, dtype in self._sites])
        adapter = LoraAdapter(packed, embedding)
        if embedding is not None:
            self._embedded[adapter.address] = adapter
        return adapter

    def embed_(self, x: Tensor, token_ids: Tensor, lora: Tensor) -> None:
        """Add to embeddings x [T, hidden] of tokens [T] what the tokens' adapters add."""
        if not self._embedded:
            return
        for address in set(lora.tolist()):
            adapter = self._embedded.get(address)
            if adapter is not None and adapter.embedding is not None:
                rows = (lora == address).nonzero().squeeze(1)
                a, b = adapter.embedding
                x[rows] += a[token_ids[rows]] @ b

    def _adaptable(self, layer: Linear, source: LinearSource, dtype: torch.dtype) -> Adaptable:
        self._sites.append((source, dtype))
        widths = tuple(piece.out_features for piece in source.pieces)
        return Adaptable(layer, self._ops, len(self._sites) - 1, widths)

    def _know(self, target: Target, names: Iterable[str]) -> None:
        self.targets |= dict.fromkeys(names, target)

    def _aliases(self, name: str) -> list[str]:
        """The name with each possible prefix."""
        own = next((prefix for prefix in self._prefixes if name.startswith(prefix)), "")
        return [name, *(prefix + name.removeprefix(own) for prefix in self._prefixes)]


def _site(source: LinearSource, dtype: torch.dtype, pairs: Pairs) -> Site | None:
    parts = tuple(_part(piece, pairs.get(piece.name)) for piece in source.pieces)
    return Site(parts, dtype) if any(parts) else None


def _part(piece: Piece, pair: tuple[Tensor, Tensor] | None) -> Pair | None:
    """The rows and columns that a rank's layer has taken of a weight."""
    if pair is None:
        return None
    a, b = pair
    return Pair(a[:, slice(*piece.columns)], torch.cat([b[slice(*rows)] for rows in piece.rows]))
