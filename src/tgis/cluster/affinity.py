"""Which replica a prompt goes to, where prompts that begin alike are to meet.

A ring of hashes (Karger et al., 1997) with a bound on the load (Mirrokni, Thorup, Zadimoghaddam:
Consistent Hashing with Bounded Loads, 2018): a prompt's beginning names a point of the ring, and
the request goes to the first replica from there on that has not much more to do than the others.
Routers need no common memory, and few prompts move when a replica comes or goes.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b

from tgis.proto import generation_pb2 as pb

MARK = b"\x00tgis\x01\xf5\xff"  # no UTF-8, and in no message of ours at this place
NO_KEY = bytes(8)
PREFIX_CHARACTERS = 256  # what prompts have in common is mostly at least this long
BOUND = 1.25  # times the mean load that a replica may have, and one request more
_POINTS = 64  # of the ring for each replica


def key_of(request: pb.BatchedGenerationRequest | pb.SingleGenerationRequest) -> bytes:
    """Eight bytes that are the same for requests whose cached beginnings can be shared."""
    if isinstance(request, pb.SingleGenerationRequest):
        text = request.request.text
    else:
        text = request.requests[0].text if request.requests else ""
    prefix = "\0".join((request.prefix_id, request.adapter_id, text[:PREFIX_CHARACTERS]))
    return _hash(prefix.encode(errors="replace"))


def key_in(message: bytes) -> bytes:
    """The key in a message that contains a marked request; `NO_KEY` if there is none."""
    _, _, rest = message.partition(MARK)
    return rest[:8] or NO_KEY


class Ring:
    """Points on a circle, some for each replica."""

    def __init__(self, replicas: Iterable[str]) -> None:
        points = sorted(
            (_hash(f"{name}:{number}".encode()), name)
            for name in replicas
            for number in range(_POINTS)
        )
        self._hashes = [point for point, _ in points]
        self._names = [name for _, name in points]

    def walk(self, key: bytes) -> Iterator[str]:
        """Every replica once, in the order in which a key prefers them."""
        start, seen = bisect.bisect(self._hashes, key), set()
        for index in range(len(self._names)):
            name = self._names[(start + index) % len(self._names)]
            if name not in seen:
                seen.add(name)
                yield name


def choose(order: Iterable[str], load_of: Callable[[str], float], mean: float) -> str | None:
    """The first replica whose load is within the bound; None if there is none.

    Args:
        load_of: requests that a replica has.
        mean: of all replicas.
    """
    most = BOUND * mean + 1
    return next((name for name in order if load_of(name) < most), None)


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).digest()
