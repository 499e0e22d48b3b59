"""The processes of a model that is split: how many there are, and starting those of this machine.

Knows nothing of torch, so that ranks can start while the leader still imports it.
"""

import logging
import socket
import subprocess
import sys
from dataclasses import dataclass

import msgspec

from tgis.config import Config
from tgis.control import Boot, Channel
from tgis.engines.rank_wire import ToLeader
from tgis.types import ModelFiles

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Rank:
    """A rank other than the leader's, as the leader sees it."""

    number: int
    channel: Channel[ToLeader]
    process: subprocess.Popen[bytes] | None = None  # None: it was started elsewhere
    last_heard: float = 0.0  # CLOCK_MONOTONIC
    loaded: bool = False
    num_entered: int = 0  # collectives


def is_spread(config: Config) -> bool:
    """Whether the ranks are started elsewhere, each as a server of its own."""
    return config.world_size > 1


def num_ranks_here(config: Config) -> int:
    """Ranks that share this machine."""
    return config.local_world_size if is_spread(config) else config.num_shard


def start_ranks(config: Config, files: ModelFiles) -> list[Rank]:
    """Start the ranks that are the leader's to start, each as a fresh interpreter."""
    if is_spread(config):
        return []
    return [_start(config, files, number) for number in range(1, config.num_shard)]


def _start(config: Config, files: ModelFiles, number: int) -> Rank:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tgis.engines.rank_main", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    channel: Channel[ToLeader] = Channel(ours, ToLeader)
    channel.send(Boot(msgspec.structs.replace(config, rank=number), files, "", ""))
    log.info("started rank %d of %d (pid %d)", number, config.num_shard, process.pid)
    return Rank(number, channel, process)
