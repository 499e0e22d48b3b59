"""The same job by workers of a Ray cluster: Ray Data hands out shards, and again if a worker dies.

Input and output lie on a file system that all nodes see. A shard's file appears whole or not at
all, so a shard that two workers make is there once.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from tgis.batch.generate import Batch, Progress, RowFailed, Server
from tgis.batch.job import Job, Shard
from tgis.cluster.launch import connect
from tgis.cluster.options import RayOptions
from tgis.config import Config

_MAX_SHARDS_AT_ONCE = 8  # in one worker


class Worker:
    """An actor with a server of its own; shards come in threads, their rows share one loop."""

    def __init__(self, job: Job, config: Config, in_flight: int, stop: bool) -> None:
        self._job = job
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._progress = Progress(lambda _: None)

        async def start() -> Batch:
            server = await Server(config, 1).__aenter__()  # ends with this process
            return Batch(job, server, in_flight, self._progress, stop=stop)

        self._batch = asyncio.run_coroutine_threadsafe(start(), self._loop).result()

    def __call__(self, columns: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Make shards; returns the numbers of what was made since, and what ended the job."""
        names = Shard.__struct_fields__
        shards = [
            Shard(*map(int, values))
            for values in zip(*(columns[name] for name in names), strict=True)
        ]
        failed = ""
        todo = [shard for shard in shards if not self._job.is_done(shard)]
        try:
            asyncio.run_coroutine_threadsafe(self._batch.run(todo), self._loop).result()
        except RowFailed as error:
            failed = str(error)
        return {"number": [shard.number for shard in shards], "failed": [failed] * len(shards)}


def make_shards(
    job: Job,
    shards: Sequence[Shard],
    config: Config,
    in_flight: int,
    options: RayOptions,
    *,
    stop: bool,
    made: Callable[[int], None],
) -> None:
    """Make every shard.

    Args:
        in_flight: rows under way at once, in each worker.
        stop: end at the first row without an answer.
        made: told how many shards have been made so far.

    Raises:
        RowFailed: a row has no answer, and the job is to stop then.
        ConfigError: there is no cluster at the address.
    """
    connect(options)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [
            {name: getattr(shard, name) for name in Shard.__struct_fields__} for shard in shards
        ]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker,
            batch_size=1,
            fn_constructor_args=(job, config, in_flight, stop),
            compute=ray.data.ActorPoolStrategy(
                size=min(options.max_replicas, len(shards)),
                max_concurrent_calls_per_actor=_MAX_SHARDS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=options.cpus * config.num_shard,
            num_gpus=options.gpus * config.num_shard,
        )
        for count, row in enumerate(results.iter_rows(), 1):
            if row["failed"]:
                raise RowFailed(row["failed"])
            made(count)
    finally:
        ray.shutdown()
