"""llama.cpp's own server over HTTP. Arguments: the program, a GGUF file, slots, slot tokens.

Runs in tgis's environment (aiohttp).
"""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys

import aiohttp
from worker import Calls, Clock, work


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def wait_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Until the model has been loaded.

    Raises:
        RuntimeError: the server has ended.
    """
    async with aiohttp.ClientSession() as session:
        while True:
            if server.poll() is not None:
                raise RuntimeError(f"llama-server ended with {server.returncode}")
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)


async def one(
    session: aiohttp.ClientSession, url: str, clock: Clock, index: int, ids: list[int], new: int
) -> None:
    """One request, streamed."""
    body = {
        "prompt": ids,
        "n_predict": new,
        "ignore_eos": True,
        "temperature": 0.0,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": False,
        "stream": True,
        "return_tokens": True,
    }
    async with session.post(f"{url}/completion", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: "):
                tokens = json.loads(line[6:]).get("tokens")
                if tokens:
                    clock.tokens(index, len(tokens))


async def offer(url: str, calls: Calls) -> dict[str, object]:
    """All requests at once."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        clock = Clock(calls)
        await asyncio.gather(
            *(one(session, url, clock, i, ids, new) for i, (ids, new) in enumerate(calls))
        )
    return clock.result()


def main() -> None:
    """Start the server, then work."""
    program, model, slots, slot_tokens = sys.argv[1:5]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    context = str(int(slots) * int(slot_tokens))
    flags = ["--parallel", slots, "--ctx-size", context, "--no-kv-unified", "--threads", "2"]
    flags += ["--threads-batch", "2", "--no-webui", "--host", "127.0.0.1", "--port", str(port)]
    flags += sys.argv[5:]
    server = subprocess.Popen(
        [program, "--model", model, *flags], stdout=subprocess.DEVNULL, stderr=sys.stderr
    )
    try:
        asyncio.run(wait_ready(url, server))
        words = (version.stdout + version.stderr).split()
        work(lambda calls: asyncio.run(offer(url, calls)), words[words.index("version:") + 1])
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
