"""Tokens a second with speculative decoding and without, in turns.

    python -m benchmarks.speculation core                 # shape M: what the mechanism gives, costs
    python -m benchmarks.speculation core --streams 1 4 16 --dtype float32
    python -m benchmarks.speculation core --draft-model
    python -m benchmarks.speculation serve                # the demo model through a real server

`core` drives two cores in this process, on one checkpoint that is made for it: model M's shape, of
which every token has a successor, the same whatever stands before it (attention and MLP are
computed and add nothing). So it is known what will be generated, and prompts can be written that
contain it (`copy`), contain it with every tenth token another (`changed`), do not contain it
(`fresh`), or hold all its runs of three tokens with a wrong continuation each (`misleading`: the
worst that can be done to prompt lookup). How often real models copy is for `serve` to say, as far
as one model can.
"""

import argparse
import asyncio
import logging
import math
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch
from safetensors.torch import load_file, save_file
from tests.kit.core_house import Front, Pulse
from tests.kit.server import Server, start_server

from benchmarks.models import EOS, VOCAB, make_model, random_tensors, shape_config
from tgis.config import SERVE, parse
from tgis.control import Boot
from tgis.core.assembly import assemble
from tgis.core.link import FrontLink
from tgis.core.loop import Core
from tgis.demo import model_dir
from tgis.hub.draft import resolve_draft
from tgis.hub.resolve import resolve
from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc as pb_grpc
from tgis.types import DetailParams, SamplingParams
from tgis.wire import Add

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
Path_ = list[int]


def successors() -> list[int]:
    """The token that follows each; one cycle through all but the last."""
    order = list(range(EOS))
    random.Random(0).shuffle(order)
    following = [0] * VOCAB
    for token, after in zip(order, order[1:] + order[:1], strict=True):
        following[token] = after
    return following


def walk(following: Sequence[int], start: int, length: int) -> Path_:
    """What is generated after `start`, which is not part of it."""
    path = []
    for _ in range(length):
        start = following[start]
        path.append(start)
    return path


def make_successor_model(directory: Path, following: Sequence[int], wrong: float = 0.0) -> Path:
    """Turn a checkpoint with random weights into one that generates the successors.

    Args:
        wrong: the share of tokens after which it says something else.
    """
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    chooser = random.Random(1)
    said = [chooser.randrange(EOS) if chooser.random() < wrong else token for token in following]
    embeddings = tensors["model.embed_tokens.weight"]
    embeddings /= embeddings.float().norm(dim=1, keepdim=True).to(embeddings.dtype)
    head = torch.zeros_like(embeddings)
    head[torch.tensor(said[:EOS])] = embeddings[:EOS]
    tensors["lm_head.weight"] = head
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def small_model(directory: Path) -> Path:
    """A checkpoint with random weights, an eighth of M's."""
    import json

    directory.mkdir()
    config = shape_config("M") | SMALL
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(model_dir() / file, directory / file)
    tensors = random_tensors({k: v for k, v in config.items() if isinstance(v, int)}, 3)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _copy(path: Path_, rng: random.Random) -> Path_:
    return path + [rng.randrange(EOS) for _ in range(32)]


def _changed(path: Path_, rng: random.Random) -> Path_:
    tokens = [rng.randrange(EOS) if i % 10 == 9 else token for i, token in enumerate(path)]
    return _copy(tokens, rng)


def _fresh(path: Path_, rng: random.Random) -> Path_:
    return [rng.randrange(EOS) for _ in range(len(path) + 32)]


def _misleading(path: Path_, rng: random.Random) -> Path_:
    runs = [path[i : i + 3] for i in range(len(path) - 3)]
    rng.shuffle(runs)
    return [token for run in runs for token in (*run, rng.randrange(EOS))]


PROMPTS: dict[str, Callable[[Path_, random.Random], Path_]] = {
    "copy": _copy,
    "changed": _changed,
    "fresh": _fresh,
    "misleading": _misleading,
}


@dataclass
class Side:
    """One core, and a client of it."""

    core: Core
    front: Front
    last_id: int = 0

    def seconds(self, prompts: Sequence[Path_], num_tokens: int) -> float:
        """Seconds of decoding: from the last stream's first token to the end."""
        ids = range(self.last_id + 1, self.last_id + 1 + len(prompts))
        self.last_id = ids[-1]
        for seq_id, prompt in zip(ids, prompts, strict=True):
            add = Add(seq_id, prompt, SamplingParams(), DetailParams(), num_tokens, math.inf, 0.0)
            self.front.send(add)
        start = 0.0
        while not all(seq_id in self.front.finish for seq_id in ids):
            self.core.turn(0.0)
            self.front.read()
            if not start and all(seq_id in self.front.tokens for seq_id in ids):
                start = time.perf_counter()
        return time.perf_counter() - start

    def counts(self) -> tuple[int, int, int]:
        """Drafts, their tokens, those accepted, so far."""
        steps = [out.step.drafts for out in self.front.outs if out.step]
        sums = [sum(getattr(d, name) for d in steps) for name in DRAFTS]
        return sums[0], sums[1], sums[2]


DRAFTS = ("num_drafts", "num_drafted", "num_accepted")


def open_side(model: Path, directory: Path, flags: Sequence[str]) -> Side:
    """A core that serves this model, as settings say."""
    config = parse([str(model), "--prefix-caching", "false", *flags], {}, SERVE)
    files = resolve(config)
    socket = directory / f"{len(list(directory.iterdir()))}.sock"
    link = FrontLink(socket)
    draft = resolve_draft(config, Path(files.path), directory)
    boot = Boot(config, files, str(model), str(socket), draft)
    core, _ = assemble(boot, link, Pulse(), lambda *_: None, [])
    return Side(core, Front(socket))


def measure_core(arguments: argparse.Namespace, directory: Path) -> None:
    """Print the table of `core`."""
    following = successors()
    model = make_successor_model(make_model("M", directory / "M"), following)
    drafts = "prompt-lookup"
    if arguments.draft_model:
        small = make_successor_model(small_model(directory / "small"), following, wrong=0.1)
        drafts = str(small)
    flags = ["--dtype", arguments.dtype, *arguments.server_flags]
    sides = [open_side(model, directory, flags)]
    sides.append(open_side(model, directory, [*flags, "--speculate", drafts]))
    print("| streams | prompts | off, tokens/s | on | ratio | drafted | accepted |")
    print("|---|---|---|---|---|---|---|")
    rng = random.Random(5)
    for streams in arguments.streams:
        for kind in arguments.prompts:
            seconds: list[list[float]] = [[], []]
            before = sides[1].counts()
            for number in range(arguments.rounds + 1):  # the first is not counted
                prompts = []
                for _ in range(streams):
                    start = rng.randrange(EOS)
                    path = [start, *walk(following, start, arguments.tokens + 8)]
                    prompts.append([*PROMPTS[kind](path, rng), start])
                for side, times in zip(sides, seconds, strict=True):
                    spent = side.seconds(prompts, arguments.tokens)
                    if number:
                        times.append(spent)
                same = [side.front.tokens[side.last_id] for side in sides]
                assert same[0] == same[1], "outputs differ"
            after = sides[1].counts()
            total = streams * (arguments.tokens - 1)
            rates = [total / statistics.median(times) for times in seconds]
            _, drafted, accepted = (b - a for a, b in zip(before, after, strict=True))
            print(
                f"| {streams} | {kind} | {rates[0]:.0f} | {rates[1]:.0f} |"
                f" {rates[1] / rates[0]:.2f} | {drafted} | {accepted} |",
                flush=True,
            )


def texts(number: int) -> dict[str, str]:
    """Prompts for the demo model, by kind."""
    page = _story(number)
    half = page[: len(page) // 2]
    return {
        "a page, and its first half again": f"{page} {half}",
        "a page": page,
        "a line": " ".join(page.split()[:12]),
    }


def _story(number: int) -> str:
    names = ["Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Sue"]
    things = ["a red ball", "an old book", "a small boat", "a blue hat", "a long rope"]
    places = ["the park", "the river", "the big hill", "the garden", "the old shop"]
    rng = random.Random(number)
    lines = []
    for _ in range(6):
        a, b = rng.sample(names, 2)
        thing, place = rng.choice(things), rng.choice(places)
        lines.append(
            rng.choice(
                [
                    f"{a} found {thing} near {place} and showed it to {b}.",
                    f'"Do you want {thing}?" said {a}. {b} was very happy.',
                    f"They went to {place} with {thing}, but {b} was sad.",
                    f"{b} asked {a} to play at {place} after lunch.",
                ]
            )
        )
    return " ".join(lines)


async def _generate(server: Server, text: str, tokens: int, sampling: bool) -> tuple[str, float]:
    """The text, and tokens a second after the first."""
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        params = pb.Parameters(
            stopping=pb.StoppingCriteria(max_new_tokens=tokens, min_new_tokens=tokens)
        )
        if sampling:
            params.method = pb.SAMPLE
            params.sampling.CopyFrom(pb.SamplingParameters(seed=7, temperature=1.0))
        request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text=text), params=params)
        said, start, first, last = "", 0.0, 0, 0
        async for message in stub.GenerateStream(request):
            said += message.text
            last = message.generated_token_count or last
            if last and not start:
                start, first = time.perf_counter(), last
        return said, (last - first) / (time.perf_counter() - start)


def measure_servers(arguments: argparse.Namespace, directory: Path) -> None:
    """Print the table of `serve`."""
    model = arguments.model or model_dir()
    flags = ["--prefix-caching", "false", *arguments.server_flags]
    servers = []
    try:
        for drafts in ("off", "prompt-lookup"):
            folder = directory / drafts
            folder.mkdir()
            servers.append(
                start_server(model, folder, *flags, "--speculate", drafts, dtype=arguments.dtype)
            )
        for server in servers:
            server.wait_ready(300)
        print("| prompts | off, tokens/s | on | ratio | drafted | accepted |")
        print("|---|---|---|---|---|---|")
        for sampling in (False, True):
            for kind in texts(0):
                _measure_kind(arguments, servers, kind, sampling)
    finally:
        for server in servers:
            server.stop(30)


def _measure_kind(
    arguments: argparse.Namespace, servers: Sequence[Server], kind: str, sampling: bool
) -> None:
    rates: list[list[float]] = [[], []]
    before = _counts(servers[1])
    for number in range(arguments.rounds + 1):
        answers = []
        for server, list_ in zip(servers, rates, strict=True):
            text = texts(number)[kind]
            said, rate = asyncio.run(_generate(server, text, arguments.tokens, sampling))
            answers.append(said)
            if number:
                list_.append(rate)
        assert answers[0] == answers[1], "outputs differ"
    drafted, accepted = (b - a for a, b in zip(before, _counts(servers[1]), strict=True))
    off, on = (statistics.median(list_) for list_ in rates)
    name = f"{kind}, {'sampled' if sampling else 'greedy'}"
    print(f"| {name} | {off:.0f} | {on:.0f} | {on / off:.2f} | {drafted:.0f} | {accepted:.0f} |")


def _counts(server: Server) -> tuple[float, float]:
    _, page = server.get("/metrics")
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("tgi_spec"))
    names = ("draft_tokens", "accepted_tokens")
    drafted, accepted = (float(values[f"tgi_speculation_{name}_total"]) for name in names)
    return drafted, accepted


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["core", "serve"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1])
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--draft-model", action="store_true", help="`core`: a small model drafts")
    parser.add_argument("--model", type=Path, help="`serve`: another one than the demo model")
    parser.add_argument("server_flags", nargs="*")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as directory:
        run = measure_core if arguments.what == "core" else measure_servers
        run(arguments, Path(directory))


if __name__ == "__main__":
    main()
