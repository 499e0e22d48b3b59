"""What the leader of a sharded model and its ranks say to each other; framed as in `tgis.wire`.

    leader -> rank   Boot (to those it starts) or Welcome (to those that join), Connect, Allocate,
                     then Step, Release, Attach and Detach in any order
    rank -> leader   Hello (of those that join), Beat at any time, Loaded, Connected, Allocated;
                     Fatal and Broken when it cannot go on

Tensors of steps never travel here: collectives carry those.
"""

import msgspec

from tgis.control import Boot, Fatal
from tgis.engines.base import CacheShape
from tgis.engines.plan import StepPlan
from tgis.types import AdapterKind


class Hello(msgspec.Struct, frozen=True, tag=10):
    """A rank that was started elsewhere asks to join; all must agree on all but `rank`."""

    rank: int
    world_size: int
    version: str  # of tgis
    model: str  # digest of config.json
    dtype: str


class Welcome(msgspec.Struct, frozen=True, tag=11):
    """All ranks are there: load."""


class Beat(msgspec.Struct, frozen=True, tag=12):
    """The rank's process lives, and has entered so many collectives."""

    num_entered: int


class Loaded(msgspec.Struct, frozen=True, tag=13):
    """The rank's part of the model is in memory."""

    available_memory: int  # bytes, of its machine
    ranks_here: int  # that share them


class Connect(msgspec.Struct, frozen=True, tag=14):
    """Meet the other ranks for collectives, at this store."""

    host: str
    port: int


class Connected(msgspec.Struct, frozen=True, tag=15):
    """The rank has met all others."""


class Allocate(msgspec.Struct, frozen=True, tag=16):
    """Make the key/value cache."""

    shape: CacheShape


class Allocated(msgspec.Struct, frozen=True, tag=17):
    """The cache is there."""


class Step(msgspec.Struct, frozen=True, tag=18):
    """Take part in a step."""

    plan: StepPlan


class Release(msgspec.Struct, frozen=True, tag=19):
    """Give the memory of these slots back."""

    slots: list[int]


class Attach(msgspec.Struct, frozen=True, tag=21):
    """An adapter that later steps name; all of it, of which each rank takes its part."""

    handle: int
    kind: AdapterKind
    data: bytes


class Detach(msgspec.Struct, frozen=True, tag=22):
    """No later step names this adapter."""

    handle: int


class Broken(msgspec.Struct, frozen=True, tag=20):
    """The rank cannot reach another one."""

    message: str


ToRank = Boot | Welcome | Fatal | Connect | Allocate | Step | Release | Attach | Detach
ToLeader = Hello | Beat | Loaded | Connected | Allocated | Broken | Fatal
