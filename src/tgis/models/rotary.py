"""Rotary position tables and their scaling kinds.

Each kind turns a `Rotary` and the number of positions served into inverse frequencies [dim / 2] and
a factor on cosine and sine. Formulas: RoFormer (arXiv:2104.09864), linear interpolation
(arXiv:2306.15595), YaRN (arXiv:2309.00071), LongRoPE (arXiv:2402.13753), and the reference code
published with Llama 3.1.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from tgis.errors import ModelError
from tgis.models.model_config import ModelConfig
from tgis.models.spec import Rotary

Frequencies = tuple[torch.Tensor, float]


def read_rotary(config: ModelConfig, head_dim: int, fraction: float = 1.0) -> Rotary:
    """Rotary positions from `rope_parameters`, or from `rope_theta` and `rope_scaling`.

    Args:
        config: the model's configuration.
        head_dim: values of one head.
        fraction: the part of each head that rotates, where the configuration does not say.

    Raises:
        ModelError: an unknown kind, or a parameter of it is missing or wrong.
    """
    rope = config.section("rope_parameters", "rope_scaling")
    name = rope.string("rope_type", "type", default="default")
    if name not in KINDS:
        raise ModelError(
            f"config.json: rope_scaling type {name!r} is not supported (only {', '.join(KINDS)})"
        )
    kind = KINDS[name]
    trained = config.size("max_position_embeddings", default=2048)
    parameters = {key: rope.number(key, above=0) for key in kind.required}
    for key, value in kind.optional.items():
        parameters[key] = rope.number(key, above=0) if rope.has(key) else value
    if kind.original:
        inside = rope.size("original_max_position_embeddings", default=trained)
        trained = config.size("original_max_position_embeddings", default=inside)
    extended = config.size("max_position_embeddings", default=trained)
    parameters |= {"extension": extended / trained, "truncate": rope.flag("truncate", default=True)}
    fraction = config.number("partial_rotary_factor", "rotary_pct", default=fraction)
    dim = int(head_dim * rope.number("partial_rotary_factor", default=fraction))
    dim += dim % 2
    if not 2 <= dim <= head_dim:
        raise ModelError(f"config.json: rotary positions on {dim} of {head_dim} values of a head")
    theta = config.number("rope_theta", "rotary_emb_base", default=10_000.0, above=1)
    lists = {key: _factors(rope, key, dim // 2) for key in kind.lists}
    theta = rope.number("rope_theta", default=theta, above=1)
    return Rotary(dim, theta, name, parameters, lists, trained)


def rotary_table(rotary: Rotary, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position, each float32 [num_positions, dim / 2].

    A head's value i turns with value i + dim / 2.
    """
    inverse, factor = KINDS[rotary.kind].frequencies(rotary, num_positions)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inverse
    return angles.cos() * factor, angles.sin() * factor


def max_positions(rotary: Rotary) -> int | None:
    """The first position that cannot be served; None = no such."""
    return rotary.trained_positions if rotary.kind == "dynamic" else None


def _factors(rope: ModelConfig, key: str, count: int) -> tuple[float, ...]:
    values = rope.get(key)
    good = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    if not good or len(values) != count:
        raise ModelError(f"config.json: {key} must list {count} numbers")
    return tuple(float(value) for value in values)


def _powers(rotary: Rotary) -> torch.Tensor:
    """theta ^ (2 i / dim), [dim / 2]."""
    exponents = torch.arange(0, rotary.dim, 2, dtype=torch.float32) / rotary.dim
    return torch.as_tensor(rotary.theta**exponents)


def _default(rotary: Rotary, num_positions: int) -> Frequencies:
    return 1.0 / _powers(rotary), 1.0


def _linear(rotary: Rotary, num_positions: int) -> Frequencies:
    return 1.0 / _powers(rotary) / rotary.parameters["factor"], 1.0


def _llama3(rotary: Rotary, num_positions: int) -> Frequencies:
    parameters = rotary.parameters
    factor, low, high = (
        parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    inverse = 1.0 / _powers(rotary)
    turns = rotary.trained_positions * inverse / (2 * math.pi)  # over the trained positions
    # 1 = many turns, kept as they are; 0 = few turns, interpolated.
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return inverse * (keep + (1.0 - keep) / factor), 1.0


def _yarn(rotary: Rotary, num_positions: int) -> Frequencies:
    parameters = rotary.parameters
    factor = parameters["factor"] or parameters["extension"]

    def dim_of(turns: float) -> float:
        """The (fractional) pair that makes so many turns over the trained positions."""
        ratio = rotary.trained_positions / (turns * 2 * math.pi)
        return rotary.dim * math.log(ratio) / (2 * math.log(rotary.theta))

    low, high = dim_of(parameters["beta_fast"]), dim_of(parameters["beta_slow"])
    if parameters["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    pairs = torch.arange(rotary.dim // 2, dtype=torch.float32)
    interpolate = ((pairs - low) / ((high - low) or 0.001)).clamp(0.0, 1.0)
    inverse = 1.0 / _powers(rotary)
    return inverse * (interpolate / factor + 1.0 - interpolate), _yarn_factor(parameters, factor)


def _yarn_factor(parameters: Mapping[str, float], factor: float) -> float:
    if parameters["attention_factor"]:
        return parameters["attention_factor"]

    def scale(weight: float) -> float:
        return max(1.0, 0.1 * weight * math.log(factor) + 1.0)

    if parameters["mscale"] and parameters["mscale_all_dim"]:
        return scale(parameters["mscale"]) / scale(parameters["mscale_all_dim"])
    return scale(1.0)


def _longrope(rotary: Rotary, num_positions: int) -> Frequencies:
    """Short or long factors for all sequences, by the longest that is served.

    A cached key cannot change its frequencies when its sequence grows past the trained length.
    """
    long = num_positions > rotary.trained_positions
    stretch = torch.tensor(rotary.lists["long_factor" if long else "short_factor"])
    factor = rotary.parameters["factor"] or rotary.parameters["extension"]
    attention_factor = rotary.parameters["attention_factor"]
    if not attention_factor:
        growth = math.log(max(factor, 1.0)) / math.log(rotary.trained_positions)
        attention_factor = math.sqrt(1.0 + growth)
    return 1.0 / (stretch * _powers(rotary)), attention_factor


class Kind(NamedTuple):
    """A scaling kind: its formula, and the parameters that it reads from `config.json`."""

    frequencies: Callable[[Rotary, int], Frequencies]
    required: tuple[str, ...] = ()
    optional: Mapping[str, float] = MappingProxyType({})  # name -> default; 0 = derived
    lists: tuple[str, ...] = ()
    original: bool = False  # reads original_max_position_embeddings


KINDS = {
    "default": Kind(_default),
    "linear": Kind(_linear, ("factor",)),
    # Grows its base with the sequence, beyond the trained positions only; those are the limit here.
    "dynamic": Kind(_default, ("factor",)),
    "llama3": Kind(_llama3, ("factor", "low_freq_factor", "high_freq_factor"), original=True),
    "yarn": Kind(
        _yarn,
        optional={
            "factor": 0,
            "attention_factor": 0,
            "mscale": 0,
            "mscale_all_dim": 0,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        original=True,
    ),
    "longrope": Kind(
        _longrope,
        optional={"factor": 0, "attention_factor": 0},
        lists=("short_factor", "long_factor"),
        original=True,
    ),
}
