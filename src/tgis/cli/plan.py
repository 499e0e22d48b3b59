"""`tgis plan`: how many replicas a load needs, without loading a model."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from tgis.errors import ConfigError

if TYPE_CHECKING:
    from tgis.capacity import Load, Plan, Shape

_DESCRIPTION = """\
What a replica holds and does, and how many of them a load needs. Only config.json is read, and the
headers of the weights if they are there. Costs are estimated from a machine's bandwidth and
arithmetic; better, give --one-stream, --streams-32 and --first-token-ms, which
`python -m benchmarks.serving --workloads W1 W2` prints for your model on your machine.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; tgis plan --help lists all arguments")


def plan(words: Sequence[str]) -> int:
    """Print a plan; returns the exit code."""
    given = _parser().parse_args(words)
    from tgis import capacity, demo
    from tgis.config import parse
    from tgis.core.memory import DEFAULT_SHARE
    from tgis.core.pool import DEFAULT_MAX_RUNNING, DEFAULT_STEP_TOKENS
    from tgis.engines.host_memory import available_memory
    from tgis.hub.resolve import locate

    cache = parse([], os.environ).hf_hub_cache
    directory = locate(given.model, None, cache) if given.model else demo.model_dir()
    shape = capacity.read_shape(directory, given.dtype, given.model or "demo")
    load = capacity.Load(given.qps, given.prompt_tokens, given.new_tokens, given.cached)
    measured = (given.one_stream, given.streams_32, given.first_token_ms)
    if all(measured):
        cost = capacity.Cost.measured(shape, measured[0], measured[1], measured[2] / 1e3)
    elif any(measured):
        raise ConfigError("--one-stream, --streams-32, --first-token-ms: give all three or none")
    else:
        rates = (given.bandwidth * 1e9, given.prefill_tflops * 1e12, given.decode_tflops * 1e12)
        cost = capacity.Cost.estimated(shape, *rates)
    machine = capacity.Machine(
        memory=given.memory or available_memory(),
        kv_share=DEFAULT_SHARE,
        max_running=given.max_batch_size or DEFAULT_MAX_RUNNING,
        step_tokens=DEFAULT_STEP_TOKENS,
        num_shards=given.num_shard,
    )
    wanted = given.gap_ms / 1e3
    found = capacity.make_plan(
        shape, cost, load, machine, wanted_gap=wanted, utilisation=given.utilisation
    )
    print("\n".join(f"{name:<42}{value}" for name, value in _lines(shape, load, found)))
    return 0


def _lines(shape: "Shape", load: "Load", plan: "Plan") -> list[tuple[str, str]]:
    mib = 1 << 20
    tokens = plan.capacity * load.new_tokens
    return [
        ("parameters", f"{shape.num_parameters / 1e6:,.1f} million"),
        ("weights of a process", f"{plan.weight_bytes / mib:,.0f} MiB"),
        ("a step's memory, about", f"{plan.step_bytes / mib:,.0f} MiB"),
        ("keys and values of a token", f"{shape.kv_bytes_per_token / 1024:,.1f} KiB"),
        ("tokens of keys and values in a replica", f"{plan.kv_tokens:,}"),
        ("sequences for which there is memory", f"{plan.most_running:,}"),
        ("sequences at a replica's limit", f"{plan.running:,}"),
        ("  between two of its tokens", f"{plan.gap * 1e3:.1f} ms"),
        ("  requests a second", f"{plan.capacity:.2f} ({tokens:,.0f} tokens)"),
        ("replicas for this load", f"{plan.replicas:,}"),
        ("sequences in each of them", f"{plan.load_running:.1f}"),
        ("  between two of its tokens", f"{plan.load_gap * 1e3:.1f} ms"),
        ("  to the first token, if none waits", f"{plan.first_token * 1e3:.0f} ms"),
        ("a front's share of a core", f"{plan.front_share:.0%}"),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tgis plan",
        description=_DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="a directory with config.json, or a name in the cache (the demo)")
    add("--qps", type=_positive, required=True, help="requests a second of all clients")
    add("--prompt-tokens", type=_positive, default=150.0, metavar="N", help="mean (150)")
    add("--new-tokens", type=_positive, default=100.0, metavar="N", help="mean (100)")
    add("--cached", type=_share, default=0.0, metavar="SHARE", help="of prompt tokens cached (0)")
    add("--memory", type=_size, metavar="SIZE", help="of a process, 16GiB (what is free here)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--num-shard", type=_count, default=1, metavar="N", help="processes of a replica (1)")
    add("--max-batch-size", type=_count, metavar="N", help="as the server's setting (128)")
    add("--gap-ms", type=_positive, default=float("inf"), metavar="MS", help="most between tokens")
    add("--utilisation", type=_part, default=0.7, metavar="SHARE", help="of capacity used (0.7)")
    measured = parser.add_argument_group("measured, 128 tokens in and out")
    measured.add_argument("--one-stream", type=_positive, metavar="TOKENS/S", help="W1")
    measured.add_argument("--streams-32", type=_positive, metavar="TOKENS/S", help="W2")
    measured.add_argument("--first-token-ms", type=_positive, metavar="MS", help="W1")
    machine = parser.add_argument_group("or of the machine; defaults are docs/performance.md's")
    machine.add_argument("--bandwidth", type=_positive, default=25.0, metavar="GB/S")
    machine.add_argument("--prefill-tflops", type=_positive, default=1.0, metavar="N")
    machine.add_argument("--decode-tflops", type=_positive, default=0.7, metavar="N")
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e12:
        raise argparse.ArgumentTypeError(f"{text[:40]!a}: must be a number above 0")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!a}: must be a number from 0 to 1")
    return value


def _part(text: str) -> float:
    if (value := _share(text)) == 0:
        raise argparse.ArgumentTypeError("'0': must be a number above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text[:40]!a}: must be an integer from 1")
    return int(text)


def _size(text: str) -> int:
    from tgis.config.setting import SIZE

    try:
        return int(SIZE.read(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!a}: expected {SIZE.rule}") from None
