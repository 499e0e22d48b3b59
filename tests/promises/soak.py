"""Promise 9: hours of mixed traffic leave memory, files and threads as they were."""

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from safetensors.numpy import save_file
from tests.kit.server import Server

from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc as pb_grpc

from .figures import Figure, Promise
from .house import (
    TEXT,
    cache_rss,
    compute_every_size,
    gauge,
    holdings,
    pid_of,
    rss,
    serving,
    settle,
    single,
    streaming,
)

SECONDS = {True: 3600.0, False: 600.0}
CLIENTS = 12
ADAPTERS, HIDDEN, LAYERS = 6, 256, 6
LOOKS = 20  # at memory, in the time that counts
# The last one: soft prompts that are in use fill the cache.
EXPECTED = ("OK", "CANCELLED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
FLAGS = ("--max-batch-size", "8", "--kv-cache-memory", "24MiB", "--prompt-cache-size-mb", "1",
         "--lora-cache-size-mb", "1", "--log-level", "warning", "--no-log-prompts")  # fmt: skip


def store(directory: Path) -> None:
    """Soft prompts and LoRA in the format of PEFT, more of each than fit into their caches."""
    rng = np.random.default_rng(0)

    def tensor(*shape: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
        return rng.normal(size=shape, scale=0.1).astype(np.float32)

    rank = 16
    for number in range(ADAPTERS):
        prompt = {"prompt_embeddings": tensor(300, HIDDEN)}
        config: dict[str, object] = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 300}
        save(directory / f"prompt{number}", prompt, config)
        lora = {}
        for layer in range(LAYERS):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
            lora[f"{name}_A.weight"] = tensor(rank, HIDDEN)
            lora[f"{name}_B.weight"] = tensor(HIDDEN, rank)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
        save(directory / f"lora{number}", lora, config)


def save(place: Path, tensors: dict[str, Any], config: dict[str, object]) -> None:
    """One adapter."""
    place.mkdir()
    save_file(tensors, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps(config))


def draw(rng: random.Random) -> pb.SingleGenerationRequest:
    """A request: most are plain, some ask for details or an adapter, some are wrong."""
    seed = rng.randrange(1 << 32) if rng.random() < 0.5 else None
    request = single(rng.choice([1, 5, 20, 60]), TEXT * rng.choice([1, 1, 4]), seed)
    fate = rng.random()
    if fate < 0.02:
        request.params.sampling.top_p = 7.0
        request.params.method = pb.SAMPLE
    elif fate < 0.04:
        request.params.stopping.max_new_tokens = 1 << 20
    elif fate < 0.06:
        request.prefix_id = "nobody" + str(rng.random())
    elif fate < 0.13:
        request.prefix_id = f"prompt{rng.randrange(ADAPTERS)}"
    elif fate < 0.2:
        request.adapter_id = f"lora{rng.randrange(ADAPTERS)}"
    elif fate < 0.3:
        request.params.response.generated_tokens = True
        request.params.response.token_logprobs = True
        request.params.response.top_n_tokens = 3
        request.params.response.input_tokens = rng.random() < 0.5
    elif fate < 0.35:
        request.params.stopping.stop_sequences.append(rng.choice([".", " the"]))
        request.params.stopping.min_new_tokens = 0
    return request


async def one(stub: pb_grpc.GenerationServiceStub, rng: random.Random) -> str:
    """One call; the name of the status that it ended with."""
    call = stub.GenerateStream(draw(rng))
    patience = rng.randrange(10) if rng.random() < 0.05 else None
    try:
        while patience is None or patience > 0:
            if await call.read() is grpc.aio.EOF:
                return (await call.code()).name
            patience = None if patience is None else patience - 1
        call.cancel()
    except grpc.aio.AioRpcError as error:
        return error.code().name
    except asyncio.CancelledError:
        pass
    return "CANCELLED"


async def traffic(server: Server, seconds: float, watch: "Watch | None" = None) -> Counter[str]:
    """Mixed traffic."""
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds
    looking = watch and asyncio.create_task(watch.keep_looking(seconds))
    with streaming(server.grpc) as stub:

        async def client(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < end:
                outcomes[await one(stub, rng)] += 1

        await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    if looking:
        looking.cancel()
    return outcomes


def own(pid: int) -> int:
    """Resident bytes but for keys and values, which vary below a limit of theirs."""
    return rss(pid) - cache_rss(pid)


@dataclass
class Watch:
    """Looks at the memory of processes now and then."""

    pids: list[int]
    looks: list[tuple[float, float]] = field(default_factory=list)  # seconds, MB

    async def keep_looking(self, seconds: float) -> None:
        """So often as that makes `LOOKS`, until it is cancelled."""
        while True:
            self.looks.append((time.monotonic(), sum(map(own, self.pids)) / 2**20))
            await asyncio.sleep(seconds / LOOKS)

    def slope(self) -> float:
        """MB an hour, by least squares, over the second half."""
        half = self.looks[len(self.looks) // 2 :]
        times, sizes = zip(*half, strict=True)
        return 3600 * float(np.polyfit(times, sizes, 1)[0])


def measure(full: bool, seconds: float | None = None) -> list[Figure]:
    """See the module."""
    seconds = (seconds or SECONDS[full]) * 6 / 7
    with tempfile.TemporaryDirectory(prefix="tgis-store-") as name:
        store(Path(name))
        with serving(*FLAGS, env={"PREFIX_STORE_PATH": name}) as server:
            pids = [pid_of(server, "front"), pid_of(server, "core"), server.process.pid]
            watch = Watch(pids)
            # Buffers, caches and pools have come to their size after a while.
            asyncio.run(compute_every_size(server.grpc))
            asyncio.run(traffic(server, seconds / 6))
            settle(server)
            before, memory = holdings(*pids), [own(pid) for pid in pids]
            outcomes = asyncio.run(traffic(server, seconds, watch))
            settle(server)
            after, grown = holdings(*pids), [own(pid) for pid in pids]
            growth = [(b - a) / 2**20 for a, b in zip(memory, grown, strict=True)]
            series = len(server.get("/metrics")[1].splitlines())
            asked = received(server)
            log = server.log()
    unexpected = sum(count for code, count in outcomes.items() if code not in EXPECTED)
    print("  " + ", ".join(f"{count} {code}" for code, count in outcomes.most_common()))
    print("  MB: " + " ".join(f"{size:.1f}" for _, size in watch.looks))
    return [
        Figure(f"calls in {seconds / 60:.0f} minutes of mixed traffic", outcomes.total(), None),
        Figure("... that ended unexpectedly", unexpected, 0),
        Figure("growth of memory, but for keys and values", sum(growth), 8, " MB", slack=1.5),
        Figure("... of which the core's", growth[1], None, " MB"),
        Figure("... slope over the second half, MB an hour", watch.slope(), None),
        Figure("growth of open files", after.files - before.files, 2),
        Figure("growth of threads", after.threads - before.threads, 1),
        Figure("requests received, less those that ended", asked, 0),
        Figure("lines of /metrics", series, 5000),
        Figure("tracebacks and leaks in the log",
               log.count("Traceback") + log.count("the accounts are wrong"), 0),
    ]  # fmt: skip


def received(server: Server) -> float:
    """Requests that were counted when they came and not when they ended."""
    _, text = server.get("/metrics")
    total = dict.fromkeys(("count", "success", "failure"), 0.0)
    for line in text.splitlines():
        for name in total:
            if line.startswith(f"tgi_request_{name}_total{{"):
                total[name] += float(line.split()[-1])
    assert gauge(server, "tgi_queue_size") == 0
    return total["count"] - total["success"] - total["failure"]


PROMISE = Promise("soak", "hours of mixed traffic", measure)

if __name__ == "__main__":
    PROMISE.main()
