"""Which back end attends over the `blocks` layout: chosen at start, by a table."""

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch

from tgis.errors import ConfigError
from tgis.models.attention.blocks import Attend, attend_reference
from tgis.models.attention.flex import load_flex, make_flex
from tgis.models.attention.packages import load_flash_attn, load_flashinfer, load_varlen
from tgis.models.spec import Alibi, DecoderSpec

log = logging.getLogger(__name__)

_HALVES = (torch.float16, torch.bfloat16)


class Needs(NamedTuple):
    """What of a model and a device decides."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    alibi: bool


class Backend(NamedTuple):
    """A back end.

    Attributes:
        load: imports what it needs.
        refusal: why it cannot serve these needs; "" = it can.
        block_tokens: of the blocks that it reads.
        replays: reads all lengths from tensors, so that a CUDA graph of it may be replayed.
    """

    load: Callable[[], Attend]
    refusal: Callable[[Needs], str]
    block_tokens: int
    replays: bool


class Chosen(NamedTuple):
    """A back end, loaded."""

    name: str
    attend: Attend
    block_tokens: int
    replays: bool


def needs_of(spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> Needs:
    """What a model on a device needs."""
    return Needs(device, dtype, spec.head_dim, isinstance(spec.positions, Alibi))


def _flash(needs: Needs, module: str, package: str, alibi: bool = False) -> str:
    """What kernels of flash-attn's kind do not do."""
    if needs.device.type != "cuda":
        return "it needs a CUDA device"
    if needs.dtype not in _HALVES:
        return f"it does not compute in {needs.dtype}"
    if needs.head_dim > 256 or needs.head_dim % 8:
        return f"it has no heads of {needs.head_dim}"
    if needs.alibi and not alibi:
        return "it has no ALiBi"
    return "" if find_spec(module) else f"{package} is not installed"


def _varlen(needs: Needs) -> str:
    refusal = _flash(needs, "flash_attn_interface", "flash-attn 3")
    if not refusal and torch.cuda.get_device_capability(needs.device)[0] != 9:
        return "flash-attn 3 needs compute capability 9.0"
    return refusal


def _compiled(needs: Needs) -> str:
    if needs.device.type == "cuda" and not find_spec("triton"):
        return "triton is not installed"
    return ""


def _triton(needs: Needs) -> str:
    return "it needs a CUDA device" if needs.device.type != "cuda" else _compiled(needs)


def _load_paged() -> Attend:
    from tgis.models.attention.paged import attend_paged  # imports triton

    return attend_paged


BACKENDS: dict[str, Backend] = {
    "varlen": Backend(load_varlen, _varlen, 64, True),
    "flash_attn": Backend(
        load_flash_attn,
        lambda needs: _flash(needs, "flash_attn", "flash-attn 2", alibi=True),
        256,  # it takes multiples of this only
        True,
    ),
    "flashinfer": Backend(
        load_flashinfer, lambda needs: _flash(needs, "flashinfer", "flashinfer"), 16, False
    ),
    "triton": Backend(_load_paged, _triton, 64, True),
    "flex": Backend(load_flex, _compiled, 128, True),
    "reference": Backend(lambda: attend_reference, lambda needs: "", 16, False),
}
"""By `ATTENTION`, best first."""

_ON_CPU = ("reference", "flex")


def choose_backend(asked: str | None, needs: Needs) -> Chosen:
    """The back end for a setting, or the best that there is; says so in the log.

    Args:
        asked: `ATTENTION`.

    Raises:
        ConfigError: it cannot be used here.
    """
    order = BACKENDS if needs.device.type == "cuda" else _ON_CPU
    refusals = {name: BACKENDS[name].refusal(needs) for name in BACKENDS}
    if asked is not None and refusals[asked]:
        raise ConfigError(f"ATTENTION = {asked}: {refusals[asked]}")
    name = asked or next(name for name in order if not refusals[name])
    others = "; ".join(f"{other}: {why}" for other, why in refusals.items() if why)
    log.info("attention over blocks by %s%s", name, f" ({others})" if others else "")
    backend = BACKENDS[name]
    load = backend.load
    if name == "flex" and needs.device.type != "cuda":
        load = make_flex  # compiling takes longer than it saves
    return Chosen(name, load(), backend.block_tokens, backend.replays)
