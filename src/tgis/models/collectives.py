"""Sums and gathers over the ranks that share a model. They carry tensors only, never control."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tgis.models.parallel import Shard

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_CONNECT_SECONDS = 60.0  # for all ranks to reach each other
_OK, _ERROR, _OUT_OF_MEMORY = range(3)  # how a rank's part of a step went


class GroupError(Exception):
    """A rank cannot be reached, or has not come in time; the group is of no use any more."""


class RankError(RuntimeError):
    """Another rank failed in this step; the group goes on."""


class _Backend(Protocol):
    """What we use of torch's groups, which both start an operation and return what waits for it."""

    def allreduce(self, tensors: list[Tensor], options: object) -> Any: ...

    def gather(self, out: list[list[Tensor]], tensors: list[Tensor], options: object) -> Any: ...


class Exchange(NamedTuple):
    """A tensor that the ranks sum or gather."""

    shape: tuple[int, int]
    dtype: torch.dtype


class Group:
    """The ranks that share a model, seen from one of them; a rank alone needs no connection.

    All ranks must call `sum_` and `gather` equally often and in the same order, with tensors of the
    same shapes. They are no torch operators: what records or compiles a network does not see them.

    Args:
        shard: this rank's place.
        timeout: seconds that a collective waits for the slowest rank.
    """

    def __init__(self, shard: Shard | None = None, timeout: float = 5.0) -> None:
        self.shard = shard or Shard()
        self.num_entered = 0  # collectives since the start
        self._sum_options = dist.AllreduceOptions()
        self._gather_options = dist.GatherOptions()
        for options in (self._sum_options, self._gather_options):
            options.timeout = timedelta(seconds=timeout)
        self._ranks: _Backend | None = None
        self.device = "cpu"  # type of the tensors' device, or "cuda"; chosen before `connect`
        self._gathered = False

    def connect(self, store: "Store", address: str) -> None:
        """Meet the other ranks; returns when all are there.

        Args:
            store: where they leave their addresses.
            address: of this machine, the only one that is listened on.

        Raises:
            GroupError: they did not come in time.
        """
        with _lost():
            self._ranks = BACKENDS[self.device](store, self.shard, address)

    def sum_(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, in its place.

        Raises:
            GroupError: a rank is gone, or has not come in time.
        """
        if self._ranks is not None:
            self.num_entered += 1
            with _lost():
                self._ranks.allreduce([x], self._sum_options).wait()
        return x

    def gather(self, x: Tensor, num_columns: int) -> Tensor:
        """All ranks' columns, on rank 0.

        Args:
            x: [n, this rank's of `num_columns`, as `Shard.blocks` deals them].
            num_columns: of all ranks.

        Returns:
            [n, num_columns] on rank 0; `x` elsewhere.

        Raises:
            GroupError: a rank is gone, or has not come in time.
            MemoryError: another rank had no memory for its part of this step.
            RankError: another rank failed for another reason.
        """
        if self._ranks is None:
            return x
        parts = self._gather(x, len(x), num_columns, _OK)
        if not parts:
            return x
        for rank, part in enumerate(parts):
            _check(rank, int(part[0, -1]))
        whole = torch.cat([part[: len(x), :-1] for part in parts], dim=1)
        return whole[:, :num_columns].contiguous()

    @contextmanager
    def step(self, exchanges: Sequence[Exchange]) -> Iterator[None]:
        """A step that this rank takes part in to its end, even if it fails in the middle.

        The other ranks would wait in vain for one that gave up. So it takes part in the sums that
        are left with zeros, and `gather` tells rank 0 that the step is of no use.

        Args:
            exchanges: all that the step makes, in order: sums, and at the end what it gathers.
        """
        first, self._gathered = self.num_entered, False
        try:
            yield
        except GroupError:
            raise
        except Exception as error:
            if self._ranks is not None and not self._gathered:
                *sums, ((num_rows, num_columns), dtype) = exchanges
                for shape, sum_dtype in sums[self.num_entered - first :]:
                    self.sum_(torch.zeros(shape, dtype=sum_dtype, device=self.device))
                code = _OUT_OF_MEMORY if isinstance(error, MemoryError) else _ERROR
                self._gather(
                    torch.empty(0, 0, dtype=dtype, device=self.device), num_rows, num_columns, code
                )
            raise

    def _gather(self, x: Tensor, num_rows: int, num_columns: int, code: int) -> list[Tensor]:
        """What every rank has sent; the first row ends with how it went."""
        assert self._ranks is not None
        width = -(-num_columns // self.shard.world_size) + 1
        sent = torch.zeros(max(num_rows, 1), width, dtype=x.dtype, device=self.device)
        sent[: x.shape[0], : x.shape[1]] = x
        sent[0, -1] = code
        is_first = self.shard.rank == 0
        parts = [torch.empty_like(sent) for _ in range(self.shard.world_size if is_first else 0)]
        self._gathered = True
        self.num_entered += 1
        with _lost():
            self._ranks.gather([parts] if is_first else [], [sent], self._gather_options).wait()
        return parts


def _check(rank: int, code: int) -> None:
    if code == _OUT_OF_MEMORY:
        raise MemoryError(f"no memory for a step on rank {rank}")
    if code != _OK:
        raise RankError(f"rank {rank} failed in the step")


@contextmanager
def _lost() -> Iterator[None]:
    """Errors of torch's groups are RuntimeErrors; the first line says what is the matter."""
    try:
        yield
    except RuntimeError as error:
        raise GroupError(str(error).partition("\n")[0]) from error


def _gloo(store: "Store", shard: Shard, address: str) -> _Backend:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=_CONNECT_SECONDS)
    options._threads = 1  # there is one collective at a time
    ranks: _Backend = gloo(store, shard.rank, shard.world_size, options)
    return ranks


def _nccl(store: "Store", shard: Shard, address: str) -> _Backend:
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timedelta(seconds=_CONNECT_SECONDS)
    ranks: _Backend = nccl(store, shard.rank, shard.world_size, options)
    return ranks


BACKENDS: dict[str, Callable[["Store", Shard, str], _Backend]] = {"cpu": _gloo, "cuda": _nccl}
"""Type of a device -> what connects the ranks whose tensors are on such."""
