"""How many tokens' keys and values fit into memory: measured where it can be, never guessed.

Once the weights are loaded, one small step with all its logits is run, and its peak memory is
scaled to a step of full size. Of what then is available, a share is the pool's.
"""

import logging

from tgis.engines.base import Engine
from tgis.engines.host_memory import available_memory, peak_of
from tgis.engines.meters import Meter
from tgis.engines.plan import Row, StepPlan, Want
from tgis.errors import ConfigError
from tgis.types import ModelKind

log = logging.getLogger(__name__)

# Of the memory that is available beside weights and a step's activations; the rest is for the
# front, the page cache of the weights' files, and whatever else runs on the machine.
DEFAULT_SHARE = 0.5
_PROBE_TOKENS = 64
_MIB = 1 << 20


def step_memory(engine: Engine, max_step_tokens: int, max_sequence_length: int) -> int:
    """Bytes that a step of `max_step_tokens` needs beside weights and cache, by a trial.

    The engine's cache must be allocated; slot 0 is used and given back. 0 where the system does
    not tell a process its peak.
    """
    num_tokens = min(_PROBE_TOKENS, max_step_tokens, max_sequence_length)
    tokens = [number % engine.caps.vocab_size for number in range(num_tokens)]
    has_encoder = engine.caps.kind is ModelKind.ENCODER_DECODER
    row = Row(0, 0, tokens, 0, Want.ALL, encoder_ids=tokens if has_encoder else None)
    peak = peak_of(lambda: engine.forward(StepPlan([row])))
    engine.release([0])
    return peak * max_step_tokens // num_tokens


def largest_step_memory(
    engine: Engine, meter: Meter, max_step_tokens: int, max_sequence_length: int
) -> int:
    """Bytes that the largest step needs beside weights and cache, by doing it.

    Its tokens are the ends of sequences of full length, and all their logits are wanted. The
    engine's cache must be allocated, with blocks for one such sequence.
    """
    size = engine.caps.kv_granule
    table = list(range(-(-max_sequence_length // size)))
    rows: list[Row] = []
    while (left := max_step_tokens - sum(row.num_tokens for row in rows)) > 0:
        count, number = min(left, max_sequence_length), len(rows)
        tokens = [token % engine.caps.vocab_size for token in range(count)]
        start = max_sequence_length - count
        rows.append(Row(number, number, tokens, start, Want.ALL, table))
    return meter.peak(lambda: engine.forward(StepPlan(rows)))


def kv_capacity(
    memory: int | None,
    bytes_per_token: int,
    max_sequence_length: int,
    most_tokens: int,
    *,
    granule: int = 1,
    step_bytes: int = 0,
    elsewhere: int | None = None,
    available: int | None = None,
    share: float = DEFAULT_SHARE,
) -> int:
    """Tokens that fit, a multiple of `granule`; says so in the log.

    Args:
        memory: bytes for keys and values; None = a share of what is available.
        bytes_per_token: keys and values of one token over all layers.
        most_tokens: more are of no use.
        granule: tokens that are committed at a time.
        step_bytes: what a step needs beside.
        elsewhere: bytes that are available on another machine that holds as much.
        available: bytes that are available here; None = of the machine's memory.
        share: of what is available beside a step, that the pool takes.

    Raises:
        ConfigError: not even one sequence of full length fits.
    """
    available = available_memory() if available is None else available
    available = max(min(available, available if elsewhere is None else elsewhere) - step_bytes, 0)
    room = int(available * share) if memory is None else memory
    tokens = min(room // bytes_per_token, most_tokens) // granule * granule
    if tokens < -(-max_sequence_length // granule) * granule:
        raise ConfigError(
            f"--max-sequence-length {max_sequence_length}: its keys and values need "
            f"{max_sequence_length * bytes_per_token} bytes, but "
            f"{'memory has' if memory is None else '--kv-cache-memory is'} {room}; "
            "lower --max-sequence-length or raise --kv-cache-memory"
        )
    log.info(
        "memory fits %d tokens of keys and values (%d MiB of %d MiB available; a step needs %d"
        " MiB): %d sequences of %d tokens",
        tokens,
        tokens * bytes_per_token // _MIB,
        available // _MIB,
        step_bytes // _MIB,
        tokens // max_sequence_length,
        max_sequence_length,
    )
    if memory is not None and memory > available:
        log.warning("--kv-cache-memory %d is more than the %d bytes available", memory, available)
    return tokens
