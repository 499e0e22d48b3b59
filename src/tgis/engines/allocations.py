"""Failed allocations by their proper name."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def failed_allocations() -> Iterator[None]:
    """Turn torch's error for a failed allocation, a plain RuntimeError, into a MemoryError."""
    try:
        yield
    except RuntimeError as error:
        _, found, size = str(error).partition("can't allocate memory: ")
        if not found:
            raise
        raise MemoryError(f"no memory for a step: {size}") from error
