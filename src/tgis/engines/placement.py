"""Where the native engine computes, and how its cache is laid out: from settings and machine."""

import logging
from typing import Literal, NamedTuple

import torch

from tgis.config import Config
from tgis.errors import ConfigError

log = logging.getLogger(__name__)


class Placement(NamedTuple):
    """A device, the layout of the cache there, and `ATTENTION`, which back end reads blocks."""

    device: torch.device
    layout: Literal["rows", "blocks"] = "rows"
    attention: str | None = None


HOST = Placement(torch.device("cpu"))


def choose_placement(config: Config, rank: int = 0) -> Placement:
    """The place of a rank's part of a model.

    Args:
        rank: which of `num_shard` parts it is, counted on this machine.

    Raises:
        ConfigError: there is no such device, or not that layout on it.
    """
    device = _device(config, rank)
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


def _device(config: Config, rank: int) -> torch.device:
    count = torch.cuda.device_count() if config.device != "cpu" else 0
    if config.device == "cpu" or (config.device is None and not count):
        return torch.device("cpu")
    if not count:
        raise ConfigError(
            "DEVICE = cuda: there is no CUDA device, or PyTorch is built without CUDA"
        )
    if config.num_shard > count:
        raise ConfigError(f"{config.num_shard} shards configured but only {count} GPUs detected")
    return torch.device("cuda", rank)
