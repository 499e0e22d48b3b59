"""The other ranks of a replica whose model is split: an actor for each, in the placement group.

The replica's actor has the first bundle of the group, and rank 0. A rank is an ordinary server
with RANK set, wherever Ray has put its bundle.
"""

import asyncio
import socket

import msgspec
import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tgis.config import Config
from tgis.hosted import HostedServer


class Rank:
    """One rank other than 0."""

    def __init__(self, config: Config) -> None:
        self._server = HostedServer(config, log=1)

    def ended(self) -> str:
        """How its server ended, or ""."""
        return self._server.ended

    def stop(self) -> None:
        """End it."""
        self._server.stop()


class Ranks:
    """The ranks that a replica needs beside its own; none without a placement group.

    Args:
        config: the replica's settings.
    """

    def __init__(self, config: Config) -> None:
        self.leader = config
        self._actors: list[ray.actor.ActorHandle] = []
        group = get_current_placement_group()
        if group is None or config.num_shard < 2:
            return
        world = msgspec.structs.replace(
            config,
            world_size=config.num_shard,
            master_addr=ray.util.get_node_ip_address(),
            master_port=_free_port() - 1,  # ranks meet at the port above it
        )
        self.leader = world
        for number in range(1, config.num_shard):
            strategy = PlacementGroupSchedulingStrategy(group, number)
            resources = group.bundle_specs[number]
            options = {
                "num_cpus": resources.get("CPU", 0),
                "num_gpus": resources.get("GPU", 0),
                "scheduling_strategy": strategy,
            }
            rank = msgspec.structs.replace(world, rank=number)
            self._actors.append(ray.remote(Rank).options(**options).remote(rank))

    async def lost(self) -> str:
        """How a rank has ended for good, or ""."""
        try:
            endings = await asyncio.gather(*(actor.ended.remote() for actor in self._actors))
        except ray.exceptions.RayError as error:
            return f"a rank is lost: {type(error).__name__}"
        return next(filter(None, endings), "")

    def stop(self) -> None:
        """End them all."""
        for actor in self._actors:
            ray.kill(actor)


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])
