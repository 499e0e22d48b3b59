"""Who waits for a step, and whose turn it is.

Within a tenant first come, first served. Among tenants the one that has been served least: each has
a counter of the tokens that were computed for it, and one who comes back after a pause does not
bring an old advantage along (the virtual token counter of Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024). Without tenants all is one queue.
"""

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import count

from tgis.core.sequence import Sequence

_MOST_KNOWN = 4096  # tenants that are remembered although they have nothing to do now


class Tenant:
    """One who shares the engine with others."""

    __slots__ = ("num_present", "served", "waiting")

    def __init__(self, served: int) -> None:
        self.served = served  # tokens, counted from a zero that is the same for all
        self.num_present = 0  # sequences, waiting or running
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()  # by uid


class Waiting:
    """All waiting sequences; iterated in turn."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[bytes, Tenant] = OrderedDict()
        self._by_uid: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._by_uid)

    def get(self, uid: int) -> Sequence | None:
        """A waiting sequence."""
        return self._by_uid.get(uid)

    def arrive(self, seq: Sequence) -> None:
        """Let a new sequence wait."""
        tenant = self._tenant(seq.request.tenant)
        tenant.num_present += 1
        tenant.waiting[seq.uid] = self._by_uid[seq.uid] = seq

    def put_back(self, seq: Sequence) -> None:
        """Let a sequence that was running wait again, before all others of its tenant."""
        waiting = self._tenants[seq.request.tenant].waiting
        waiting[seq.uid] = self._by_uid[seq.uid] = seq
        waiting.move_to_end(seq.uid, last=False)

    def take(self, seq: Sequence) -> None:
        """A sequence waits no longer."""
        del self._tenants[seq.request.tenant].waiting[seq.uid], self._by_uid[seq.uid]

    def leave(self, seq: Sequence) -> None:
        """A sequence that does not wait has ended."""
        self._tenants[seq.request.tenant].num_present -= 1

    def serve(self, seq: Sequence, num_tokens: int) -> None:
        """So many tokens are computed for a sequence."""
        self._tenants[seq.request.tenant].served += num_tokens

    def __iter__(self) -> Iterator[Sequence]:
        """Whose turn it is; `serve` may change that on the way, who waits must stay the same."""
        queues = [tenant for tenant in self._tenants.values() if tenant.waiting]
        if len(queues) == 1:
            yield from queues[0].waiting.values()
            return
        number = count()
        turns = [(t.served, next(number), t, iter(t.waiting.values())) for t in queues]
        heapify(turns)
        while turns:
            _, _, tenant, rest = heappop(turns)
            if (seq := next(rest, None)) is not None:
                yield seq
                heappush(turns, (tenant.served, next(number), tenant, rest))

    def _tenant(self, name: bytes) -> Tenant:
        """The tenant, who is present from now on."""
        tenant = self._tenants.get(name)
        if tenant is not None and tenant.num_present:
            return tenant
        # The least served of those present, else the most served of all: nobody has anything to
        # catch up with.
        least = min(
            (t.served for t in self._tenants.values() if t.num_present),
            default=max((t.served for t in self._tenants.values()), default=0),
        )
        if tenant is None:
            tenant = self._tenants[name] = Tenant(least)
            self._forget()
        self._tenants.move_to_end(name)
        tenant.served = max(tenant.served, least)
        return tenant

    def _forget(self) -> None:
        """Give up those who have been away for longest."""
        away = len(self._tenants) - _MOST_KNOWN
        if away > 0:
            absent = (name for name, t in self._tenants.items() if not t.num_present)
            for name in [name for _, name in zip(range(away), absent, strict=False)]:
                del self._tenants[name]
