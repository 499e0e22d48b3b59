"""Where the native engine computes, and how its cache is laid out: from settings and machine."""

import logging
from typing import Literal, NamedTuple

import torch

from tgis.config import Config
from tgis.engines.rank_process import num_ranks_here
from tgis.errors import ConfigError

log = logging.getLogger(__name__)


class Placement(NamedTuple):
    """A device, the layout of the cache there, and `ATTENTION`, which back end reads blocks."""

    device: torch.device
    layout: Literal["rows", "blocks"] = "rows"
    attention: str | None = None


HOST = Placement(torch.device("cpu"))


def choose_placement(config: Config) -> Placement:
    """The place of this rank's part of a model: on a machine with cards, one for each.

    Raises:
        ConfigError: there is no such device, or not that layout on it.
    """
    device = _device(config)
    if device.type == "cpu":
        layout = config.kv_layout or "rows"
        if config.attention and layout == "rows":
            raise ConfigError(
                f"ATTENTION = {config.attention}: it chooses what reads KV_LAYOUT = blocks, and on"
                " a CPU rows are the layout unless that is set"
            )
        return Placement(device, layout, config.attention)
    if config.kv_layout == "rows":
        raise ConfigError("KV_LAYOUT = rows: it is for CPUs; on a CUDA device leave it unset")
    return Placement(device, "blocks", config.attention)


def prepare_card(config: Config, device: torch.device) -> None:
    """Make this process use one card, within its share of the card's memory."""
    if config.pytorch_cuda_alloc_conf is None:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    torch.cuda.set_device(device)
    torch.cuda.set_per_process_memory_fraction(config.cuda_process_memory_fraction)


def _device(config: Config) -> torch.device:
    count = torch.cuda.device_count()
    if config.device != "cuda":
        if count and config.device is None:
            log.warning(
                "DEVICE is not set: the model is computed on the CPU, not on %d GPUs", count
            )
        return torch.device("cpu")
    if not count:
        raise ConfigError(
            "DEVICE = cuda: there is no CUDA device, or PyTorch is built without CUDA"
        )
    ranks_here = num_ranks_here(config)
    if ranks_here > count:
        raise ConfigError(f"{ranks_here} shards configured but only {count} GPUs detected")
    return torch.device("cuda", config.rank % ranks_here)
