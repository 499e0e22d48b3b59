"""Putting the core together: engine, memory, scheduler, sampler, loop."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from tgis.adapters.load import Rules
from tgis.adapters.lora import LoraRules
from tgis.adapters.prompts import PromptRules
from tgis.adapters.store import Store
from tgis.config import Config, effective_limits
from tgis.control import Boot
from tgis.core.adapters import Adapters
from tgis.core.drafting import Drafting
from tgis.core.link import FrontLink
from tgis.core.loop import Core, Pulse
from tgis.core.pool import Pool, make_pool
from tgis.core.scheduler import Scheduler
from tgis.core.sequence import Opening, decoder_only, encoder_decoder
from tgis.engines.base import Engine
from tgis.engines.compilation import Bounds, Compilations, compile_network
from tgis.engines.rank_process import Rank, num_ranks_here
from tgis.engines.ranks import load_sharded
from tgis.engines.registry import load_engine
from tgis.engines.threads import choose_threads
from tgis.errors import ModelError
from tgis.sampling import Sampler
from tgis.types import AdapterKind, Compilation, ModelFiles, ModelInfo, ModelKind

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def assemble(
    boot: Boot, link: FrontLink, pulse: Pulse, progress: Progress, ranks: list[Rank]
) -> tuple[Core, ModelInfo]:
    """Load the model and build the loop around it.

    Args:
        progress: told bytes read so far and bytes in all while the weights are loaded.
        ranks: processes that have been started for parts of the model.

    Raises:
        ModelError: the model cannot be served.
        ConfigError: the settings do not fit the model or the machine.
    """
    config, files = boot.config, boot.files
    threads, why = choose_threads(config.threads, files, num_ranks_here(config))
    log.info("computing with %d threads: %s", threads, why)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    limits = effective_limits(config, files)
    engine: Engine
    if config.num_shard > 1:
        engine = load_sharded(config, files, ranks, progress)
    else:
        engine = load_engine(config, files, progress)
    length, is_quantised = limits.max_sequence_length, files.quantization is not None
    drafting = Drafting(config, engine, boot.draft, length, is_quantised)
    pool = make_pool(engine, config, length, drafting.reserved_bytes)
    compilation = compile_engine(engine, config, pool, limits.max_sequence_length)
    scheduler = Scheduler(
        pool.memory,
        pool.budget,
        max_step_tokens=pool.max_step_tokens,
        max_mixed_tokens=config.max_mixed_tokens if engine.caps.chunked_prefill else None,
        mixed_step_tokens=pool.mixed_step_tokens,
        max_running=pool.max_running,
        eos_token_ids=files.eos_token_ids,
    )
    sampler = Sampler(engine.caps.vocab_size, files.eos_token_ids)
    model = ModelInfo(
        kind=engine.caps.kind,
        engine=engine.caps.name,
        dtype=engine.caps.dtype,
        vocab_size=engine.caps.vocab_size,
        max_sequence_length=limits.max_sequence_length,
        max_new_tokens=limits.max_new_tokens,
        kv_tokens=pool.memory.total,
        max_running=pool.max_running,
        compilation=compilation,
    )
    core = Core(
        engine,
        sampler,
        scheduler,
        link,
        pulse,
        opening=_opening(files),
        adapters=_adapters(config, limits.max_prompt_length, engine, link),
        pad_id=_pad_id(files, engine.caps.vocab_size),
        speculation=drafting.speculation(),
        compilations=Compilations().drain,
    )
    return core, model


def compile_engine(engine: Engine, config: Config, pool: Pool, length: int) -> Compilation:
    """PT2_COMPILE, for sequences of at most `length` tokens."""
    if not config.pt2_compile:
        return Compilation()
    bounds = Bounds(pool.max_running, pool.max_step_tokens, length, pool.memory.total)
    return compile_network(engine, config.pt2_compile_cache, bounds, config.num_shard)


def _pad_id(files: ModelFiles, vocab_size: int) -> int:
    pad = files.pad_token_id
    return pad if pad is not None and 0 <= pad < vocab_size else 0


def _adapters(
    config: Config, max_prompt_length: int, engine: Engine, link: FrontLink
) -> Adapters | None:
    if not config.prefix_store_path:
        return None
    if not Path(config.prefix_store_path).is_dir():
        log.warning("PREFIX_STORE_PATH = %s: there is no such directory", config.prefix_store_path)
    limits = {
        AdapterKind.PROMPT: config.prompt_cache_size_mb << 20,
        AdapterKind.LORA: config.lora_cache_size_mb << 20,
    }
    rules = adapter_rules(engine, max_prompt_length, limits[AdapterKind.LORA])
    if rules.prompt is None:
        log.warning(
            "Could not find input embedding layer for model - prompt prefixes disabled",
        )
    return Adapters(Store(config.prefix_store_path), rules, limits, engine, link)


def adapter_rules(engine: Engine, max_prompt_length: int, lora_limit: int) -> Rules:
    """What adapters of this engine's model must fit."""
    caps = engine.caps
    dtype: torch.dtype = getattr(torch, caps.dtype)
    prompt = lora = None
    if caps.soft_prompt_size is not None:
        prompt = PromptRules(caps.kind, caps.soft_prompt_size, dtype, max_prompt_length)
    if caps.lora_targets is not None:
        lora = LoraRules(caps.lora_targets, dtype, lora_limit)
    return Rules(prompt, lora)


def _opening(files: ModelFiles) -> Opening:
    if files.kind is ModelKind.DECODER_ONLY:
        return decoder_only
    if files.decoder_start_token_id is None:
        raise ModelError(f"Model {files.name}: config.json has no decoder_start_token_id")
    return encoder_decoder(files.decoder_start_token_id)
