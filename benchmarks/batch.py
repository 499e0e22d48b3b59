"""`tgis batch` against a server under the same load: W2's requests, again and again.

    python -m benchmarks.batch --shape M

Offline throughput is that of W2: a server with the same settings, 32 requests at once, over gRPC
streams. Times are from the first row sent to the last answer, without loading the model.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from tests.kit.server import start_server

from benchmarks.load import Call, offer
from benchmarks.models import SHAPES, make_model
from tgis.batch.generate import Batch, Progress, Server, settings
from tgis.batch.job import Job, scan
from tgis.batch.rows import parse_params
from tgis.config import parse

AT_ONCE = 32


def write_input(path: Path, waves: int) -> None:
    """Rows of W2's shape, all different."""
    with path.open("w") as file:
        for seed in range(waves * AT_ONCE):
            message = Call(128, 128, seed).message()
            params = MessageToDict(message.params)
            file.write(json.dumps({"text": message.request.text, "params": params}) + "\n")


async def run_batch(source: Path, output: Path, config_words: list[str], in_flight: int) -> float:
    """Tokens a second of a job, once its server is ready and has been warmed up."""
    config = settings(parse(config_words, {}), in_flight)
    found = scan(source, parse_params({}), AT_ONCE)
    async with Server(config, subprocess.DEVNULL) as server:
        for directory in ("warm", "timed"):
            job = Job(str(source), str(output / directory), {})
            progress = Progress(lambda _: None)
            shards = found.shards if directory == "timed" else found.shards[:1]
            start = time.perf_counter()
            await Batch(job, server, in_flight, progress).run(shards)
            seconds = time.perf_counter() - start
    assert progress.num_errors == 0
    return progress.num_tokens / seconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="M")
    parser.add_argument("--waves", type=int, default=4, help="of 32 rows")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = make_model(
        arguments.shape, Path(tempfile.gettempdir()) / f"tgis-benchmark-{arguments.shape}"
    )
    flags = ["--prefix-caching=false"]
    calls = [Call(128, 128, seed) for seed in range(AT_ONCE)]
    served, batched, wide = [], [], []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_input(directory / "in.jsonl", arguments.waves)
        words = [str(model), "--dtype=bfloat16", *flags]
        for round_ in range(arguments.rounds):
            server = start_server(model, directory, *flags, dtype="bfloat16")
            try:
                server.wait_ready(300)
                asyncio.run(offer(server.grpc, calls))
                rates = [asyncio.run(offer(server.grpc, calls)) for _ in range(2)]
                served += [rate.tokens_per_second for rate in rates]
            finally:
                server.stop(30)
            for in_flight, found in ((AT_ONCE, batched), (256, wide)):
                output = directory / f"out-{round_}-{in_flight}"
                for part in ("warm", "timed"):
                    (output / part).mkdir(parents=True)
                found.append(
                    asyncio.run(run_batch(directory / "in.jsonl", output, words, in_flight))
                )
    w2 = statistics.median(served)
    print("| | tokens/s | of W2 |\n|---|---|---|")
    rows = {"W2, gRPC streams": served, "tgis batch, 32 rows at once": batched}
    for label, values in (rows | {"tgis batch, 256 rows at once": wide}).items():
        print(
            f"| {label} | {statistics.median(values):.0f} | {statistics.median(values) / w2:.0%} |"
        )


if __name__ == "__main__":
    sys.exit(main())
