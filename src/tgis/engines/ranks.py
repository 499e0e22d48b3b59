"""A model that is split over several processes, as one engine (tensor parallelism).

The core's process is the leader, rank 0: it schedules and samples. The others hold a part of the
weights and of the cache, receive each step's plan, and take part in its collectives.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from tgis.adapters.load import Adapter
from tgis.adapters.packed import pack
from tgis.config import Config
from tgis.engines import rendezvous
from tgis.engines.base import CacheShape, Engine
from tgis.engines.plan import StepPlan
from tgis.engines.rank_process import Rank, is_spread, num_ranks_here
from tgis.engines.rank_watch import Watch, collective_timeout
from tgis.engines.rank_wire import (
    Allocate,
    Allocated,
    Attach,
    Connected,
    Detach,
    Loaded,
    Release,
    Step,
    ToRank,
)
from tgis.engines.registry import load_engine
from tgis.hub.safetensors import Progress
from tgis.models.collectives import Group, GroupError
from tgis.models.parallel import Shard
from tgis.types import ModelFiles
from tgis.wire import frame

log = logging.getLogger(__name__)


def load_sharded(
    config: Config, files: ModelFiles, ranks: list[Rank], progress: Progress | None = None
) -> "ShardedEngine":
    """Load a model into `num_shard` processes, of which this is the first.

    Args:
        ranks: those that `start_ranks` has started; the others are awaited.

    Raises:
        StartupError: a part of it cannot be loaded; the message says on which rank.
    """
    if is_spread(config):
        with rendezvous.listen(config) as server:
            own = rendezvous.hello(config, files)
            joined = rendezvous.admit(server, own, config.hang_timeout)
        ranks = [Rank(number, channel) for number, channel in sorted(joined.items())]
    group = Group(Shard(0, config.num_shard), collective_timeout(config.hang_timeout))
    watch = Watch(ranks, group, config.hang_timeout)
    watch.start()

    def watched(bytes_done: int, bytes_total: int) -> None:
        watch.check()
        if progress is not None:
            progress(bytes_done, bytes_total)

    engine = load_engine(config, files, watched, group)
    sharded = ShardedEngine(engine, ranks, watch, num_ranks_here(config))
    sharded.connect(config, group)
    return sharded


class ShardedEngine:
    """The leader's part of the model, and the ranks with the others.

    Args:
        engine: the leader's part.
        ranks_here: ranks that share this machine's memory, the leader included.
    """

    def __init__(self, engine: Engine, ranks: list[Rank], watch: Watch, ranks_here: int) -> None:
        self._engine = engine
        self._ranks = ranks
        self._watch = watch
        self.caps = replace(engine.caps, ranks_here=ranks_here)

    def connect(self, config: Config, group: Group) -> None:
        """Wait until every part is loaded, and bring the ranks together.

        Raises:
            StartupError: a rank cannot load its part, or MASTER_PORT is taken.
        """
        loaded = self._watch.expect(Loaded)
        if is_spread(config):
            here = self.caps.ranks_here
            elsewhere = min(rank.available_memory * here // rank.ranks_here for rank in loaded)
            self.caps = replace(self.caps, memory_elsewhere=elsewhere)
        store, connect, address = rendezvous.open_store(config)
        self._tell(connect)
        try:
            group.connect(store, address)
        except GroupError as error:
            self._watch.lost(error)
        self._watch.expect(Connected)
        log.info("%d ranks share the model; they meet at %s", len(self._ranks) + 1, address)

    def allocate(self, shape: CacheShape) -> None:
        """See `Engine.allocate`."""
        self._engine.allocate(shape)
        self._tell(Allocate(shape))
        self._watch.expect(Allocated)

    def forward(self, plan: StepPlan) -> Tensor:
        """See `Engine.forward`. If a rank is lost, this process ends."""
        self._tell(Step(plan))
        try:
            return self._engine.forward(plan)
        except GroupError as error:
            self._watch.lost(error)

    def attach(self, handle: int, adapter: Adapter) -> None:
        """See `Engine.attach`. A rank that has no memory for it fails in the steps that name it."""
        self._engine.attach(handle, adapter)
        self._tell(Attach(handle, *pack(adapter)))

    def detach(self, handle: int) -> None:
        """See `Engine.detach`."""
        self._tell(Detach(handle))
        self._engine.detach(handle)

    def release(self, slots: Sequence[int]) -> None:
        """See `Engine.release`."""
        self._tell(Release(list(slots)))
        self._engine.release(slots)

    def close(self) -> None:
        """See `Engine.close`; ends the other ranks."""
        self._watch.closing = True
        self._watch.join()
        for rank in self._ranks:
            rank.channel.sock.close()
            if rank.process is not None:
                rank.process.kill()
                rank.process.wait()
        self._engine.close()

    def _tell(self, message: ToRank) -> None:
        data = frame(message)
        try:
            for rank in self._ranks:
                rank.channel.sock.sendall(data)
        except OSError as error:
            self._watch.lost(error)
