"""Positions for decoders that number the columns of a batch instead of a row's tokens.

The decoders of BART and its relatives take no position ids. So the module that looks their
positions up is replaced by one that does, from a table of what the module itself gives a single
sequence. Without padding columns and tokens are the same, and the module is asked as ever.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

_GROWTH = 64  # rows that the table grows by


class RowPositions(nn.Module):
    """Stands for a decoder's `embed_positions`.

    Attributes:
        positions: int64 [rows, columns], of the tokens of the next pass; None = no padding.
    """

    def __init__(self, own: nn.Module, limit: int | None) -> None:
        super().__init__()
        self.own = own
        self.positions: Tensor | None = None
        self._limit = limit or 0
        self._table: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `torch.nn.Module`."""
        if self.positions is None:
            found: Tensor = self.own(*args, **kwargs)
            return found
        arguments = inspect.signature(self.own.forward).bind(*args, **kwargs).arguments
        size = int(self.positions.max()) + 1
        if self._table is None or len(self._table) < size:
            most = max(self._limit, size)
            self._table = self._read(min(size + _GROWTH, most), arguments)
        found = self._table[self.positions]
        padding = getattr(self.own, "padding_idx", None)
        if padding is not None and (ids := arguments.get("input_ids")) is not None:
            found = found.masked_fill((ids == padding)[..., None], 0.0)
        return found

    def _read(self, size: int, arguments: dict[str, Any]) -> Tensor:
        """What the module gives one sequence of `size` tokens: [size, width]."""
        other = (getattr(self.own, "padding_idx", None) or 0) + 1
        single: dict[str, Any] = {
            "input_ids": torch.full((1, size), other),
            "input_ids_shape": torch.Size((1, size)),
            "past_key_values_length": 0,
        }
        known = {name: single.get(name) for name in arguments}
        table: Tensor = self.own(**known)
        return table.reshape(size, -1)


def number_tokens(model: Any) -> RowPositions | None:
    """Let the decoder of an encoder-decoder model take positions; None where it needs none."""
    decoder = model.get_decoder()
    own = getattr(decoder, "embed_positions", None)
    if not isinstance(own, nn.Module):
        return None
    limit = getattr(model.config, "max_position_embeddings", None)
    decoder.embed_positions = positions = RowPositions(own, limit)
    return positions
