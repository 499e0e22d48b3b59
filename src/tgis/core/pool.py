"""Which memory and which budget an engine gets, and how large they are."""

import logging
from typing import NamedTuple

import msgspec

from tgis.config import Config
from tgis.core.budget import Budget, PaddedBudget, PaddedModel, PagedBudget
from tgis.core.kv.base import KvMemory
from tgis.core.kv.blocks import BlocksMemory
from tgis.core.kv.rows import RowsMemory
from tgis.core.memory import (
    DEFAULT_SHARE,
    kv_capacity,
    largest_step_memory,
    step_memory,
)
from tgis.engines.base import CacheShape, Engine
from tgis.engines.meters import meter_of
from tgis.errors import ConfigError
from tgis.types import ModelKind

log = logging.getLogger(__name__)

DEFAULT_MAX_RUNNING = 128
DEFAULT_MAX_RUNNING_PADDED = 12  # as TGIS
DEFAULT_STEP_TOKENS = 512
# Where prompts are computed beside streams: on a CPU their tokens cost no more in steps of 256, and
# the streams' gaps are half as long.
MIXED_STEP_TOKENS = {"cpu": 256}
# Rows per running sequence: one more of each for the cache. They cost address space only.
ROWS_PER_SEQUENCE = 2
# Steps that admission looks ahead; see docs/batching.md for the comparison of policies.
HORIZON_STEPS = 64


class Pool(NamedTuple):
    """What the scheduler works with."""

    memory: KvMemory
    budget: Budget
    max_running: int
    max_step_tokens: int
    mixed_step_tokens: int | None  # None = no other limit


def make_pool(
    engine: Engine, config: Config, max_sequence_length: int, reserved_bytes: int = 0
) -> Pool:
    """Allocate the engine's cache and account for it.

    Args:
        reserved_bytes: of the memory for keys and values, what is needed elsewhere.

    Raises:
        ConfigError: a sequence of full length does not fit, or a step has too few tokens.
    """
    layouts = {"rows": _rows, "blocks": _blocks, "padded": _padded}
    if config.kv_cache_memory is not None:
        left = max(config.kv_cache_memory - reserved_bytes, 0)
        config, reserved_bytes = msgspec.structs.replace(config, kv_cache_memory=left), 0
    pool = layouts[engine.caps.kv_layout](engine, config, max_sequence_length, reserved_bytes)
    pool.budget.check_length(max_sequence_length)
    return pool


def _rows(engine: Engine, config: Config, length: int, reserved_bytes: int) -> Pool:
    max_running = config.max_batch_size or DEFAULT_MAX_RUNNING
    max_step_tokens = _step_tokens(engine, config, max_running, length)
    num_rows = max_running * ROWS_PER_SEQUENCE
    engine.allocate(CacheShape(num_rows, length))
    granule, ranks = engine.caps.kv_granule, engine.caps.ranks_here
    total = kv_capacity(
        config.kv_cache_memory,
        engine.caps.kv_bytes_per_token * ranks,
        length,
        num_rows * (length + granule),
        granule=granule,
        step_bytes=step_memory(engine, max_step_tokens, length) * ranks + reserved_bytes,
        elsewhere=engine.caps.memory_elsewhere,
    )
    memory = RowsMemory(num_rows, total, granule=granule, caching=_caching(engine, config))
    return Pool(memory, _paged_budget(memory), max_running, max_step_tokens, _mixed(engine))


def _blocks(engine: Engine, config: Config, length: int, reserved_bytes: int) -> Pool:
    """What is left beside the largest step, which is done with blocks for one sequence."""
    caps = engine.caps
    max_running = config.max_batch_size or DEFAULT_MAX_RUNNING
    max_step_tokens = _step_tokens(engine, config, max_running, length)
    block_tokens = caps.kv_granule
    engine.allocate(CacheShape(-(-length // block_tokens), block_tokens, length))
    meter = meter_of(caps.device, config.cuda_process_memory_fraction)
    step_bytes = largest_step_memory(engine, meter, max_step_tokens, length)
    on_host = caps.device == "cpu"
    ranks = caps.ranks_here if on_host else 1  # each has a card of its own
    total = kv_capacity(
        config.kv_cache_memory,
        caps.kv_bytes_per_token * ranks,
        length,
        max_running * ROWS_PER_SEQUENCE * (length + block_tokens),
        granule=block_tokens,
        step_bytes=step_bytes * ranks + reserved_bytes,
        elsewhere=caps.memory_elsewhere if on_host else None,
        available=meter.available(),
        share=DEFAULT_SHARE if on_host else 1 - config.batch_safety_margin / 100,
    )
    num_blocks = total // block_tokens
    engine.allocate(CacheShape(num_blocks, block_tokens, length, max_running))
    memory = BlocksMemory(max_running, num_blocks, block_tokens, caching=_caching(engine, config))
    return Pool(memory, _paged_budget(memory), max_running, max_step_tokens, _mixed(engine))


def _padded(engine: Engine, config: Config, length: int, reserved_bytes: int) -> Pool:
    """The engine keeps its own cache, and the budget alone governs it."""
    max_running = config.max_batch_size or DEFAULT_MAX_RUNNING_PADDED
    engine.allocate(CacheShape(max_running, length))
    assert not reserved_bytes, "such engines verify no drafts"
    model = _padded_model(engine, config, max_running, length)
    total = int(min(model.limit, max_running * length))
    log.info(
        "ESTIMATE_MEMORY=%s: %d tokens in a batch, with padding", config.estimate_memory, total
    )
    memory = RowsMemory(max_running, total, caching=False)
    budget = PaddedBudget(
        model,
        max_prefill_padding=config.max_prefill_padding,
        max_waiting_tokens=config.max_waiting_tokens,
    )
    max_step_tokens = _step_tokens(engine, config, max_running, length)
    return Pool(memory, budget, max_running, max_step_tokens, _mixed(engine))


def _padded_model(engine: Engine, config: Config, max_running: int, length: int) -> PaddedModel:
    """ESTIMATE_MEMORY: off, manual, or auto, which measures what is available."""
    if config.estimate_memory == "off":
        return PaddedModel()
    if config.estimate_memory == "manual":
        return PaddedModel.manual(length, max_running, config.batch_safety_margin)
    tokens = kv_capacity(
        config.kv_cache_memory, engine.caps.kv_bytes_per_token, length, max_running * length
    )
    return PaddedModel.tokens(
        max(tokens * (100 - config.batch_safety_margin) // 100, length), length
    )


def _caching(engine: Engine, config: Config) -> bool:
    """What a decoder behind an encoder has computed is of no use for another input."""
    return config.prefix_caching and engine.caps.kind is ModelKind.DECODER_ONLY


def _paged_budget(memory: KvMemory) -> PagedBudget:
    return PagedBudget(memory.total, horizon=HORIZON_STEPS)


def _step_tokens(engine: Engine, config: Config, max_running: int, length: int) -> int:
    """So many that no prompt is ever cut, where the engine cannot compute it in chunks."""
    if not engine.caps.chunked_prefill:
        return max_running * (length + 1)
    if config.max_step_tokens is not None and config.max_step_tokens <= max_running:
        raise ConfigError(
            f"MAX_STEP_TOKENS = {config.max_step_tokens}: must exceed the {max_running} sequences"
            " of a batch (MAX_BATCH_SIZE), or prompts could wait for ever"
        )
    return config.max_step_tokens or max(DEFAULT_STEP_TOKENS, 2 * max_running)


def _mixed(engine: Engine) -> int | None:
    return MIXED_STEP_TOKENS.get(engine.caps.device) if engine.caps.chunked_prefill else None
