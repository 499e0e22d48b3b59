"""Serve's request router for prompts that begin alike."""

import random
from collections.abc import Sequence

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from tgis.cluster.affinity import NO_KEY, Ring, choose, key_in


class PrefixRouter(ConsistentHashRouter):  # type: ignore[misc]
    """Sends a request where others that began alike went, unless too much is there already.

    Serve's own router brings the loop that keeps each request with its choice.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The set of replicas has changed."""
        super().update_replicas(replicas)
        self._by_name = {replica.replica_id.unique_id: replica for replica in replicas}
        self._ring = Ring(self._by_name)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replica of the prompt; else, and for what is no prompt, the idler one of two."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        key = NO_KEY if pending_request is None else _key(pending_request.args)
        others = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if key == NO_KEY:
            return [others]
        names = {replica.replica_id.unique_id: replica.replica_id for replica in candidate_replicas}
        lengths = {name: self.replica_queue_len_cache.get(key_) for name, key_ in names.items()}
        loads = {name: length or 0 for name, length in lengths.items()}
        mean = sum(loads.values()) / max(1, len(loads))
        order = [name for name in self._ring.walk(key) if name in names]
        chosen = choose(order, loads.__getitem__, mean)
        return [others] if chosen is None else [[self._by_name[chosen]], others]


def _key(args: Sequence[object]) -> bytes:
    return key_in(args[0]) if args and isinstance(args[0], bytes) else NO_KEY
