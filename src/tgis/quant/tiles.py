"""Few numbers of rows for oneDNN.

It compiles code for each number of rows that a layer is called with, which takes it milliseconds,
and keeps that code: 290 KB for each of the last 1,024 kinds of call. So what has more than a few
rows is given some more, until they are of a number that others have too.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_FEW, _MANY = 16, 128  # rows
_STEP, _LARGE_STEP = 4, 16  # of more than those


def whole(rows: int) -> int:
    """The next number of rows of which there is code: at most a fifth more, 2 % on average."""
    if rows <= _FEW:
        return rows
    step = _STEP if rows <= _MANY else _LARGE_STEP
    return -(-rows // step) * step


def empty(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """[rows, cols], not set, with memory behind it for what `multiplied` adds to many rows."""
    if rows <= _MANY or (size := whole(rows)) == rows:
        return torch.empty((rows, cols), dtype=dtype)
    return torch.empty((size, cols), dtype=dtype)[:rows]


def multiplied(multiply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`multiply` of x [n, K] or of more rows, whatever is in those; n rows of its result."""
    rows = x.shape[0]
    if (size := whole(rows)) == rows:
        return multiply(x)
    return multiply(_lengthened(x, size))[:rows]


def _lengthened(x: Tensor, size: int) -> Tensor:
    """x with more rows behind it: not copied if its memory has room for them."""
    shape = (size, x.shape[1])
    end = (x.storage_offset() + size * x.shape[1]) * x.element_size()
    if x.is_contiguous() and end <= x.untyped_storage().nbytes():
        return x.as_strided(shape, x.stride())
    return functional.pad(x, (0, 0, 0, size - x.shape[0]))
