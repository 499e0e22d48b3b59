"""What `adapter_config.json` says of a LoRA adapter; what is not served is refused by name."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tgis.adapters.store import Refused
from tgis.types import AdapterKind

# Options that say nothing about how an adapter is applied, or nothing that its tensors do not say.
_INERT = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "corda_config"),
        *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern"),
        *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config"),
        *("megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size"),
        *("revision", "runtime_config", "target_modules", "task_type", "velora_config"),
    )
)
_READ = frozenset(
    ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights")
)
_OFF = {"bias": "none"}  # where that is not null, false or empty

# These begin by changing the model's own weights. PEFT can convert such adapters as it saves them,
# and then writes another value.
_CHANGES_THE_MODEL = re.compile("pissa.*|olora|corda|loftq|lora_ga")

T = TypeVar("T", int, float)

_MAX_RANK = 1 << 16
_MAX_EXPRESSIONS = 8  # patterns that are more than a name; hostile ones take long to match
_NAME = re.compile(r"[\w.]+")
_EXPRESSION = re.compile(r"[\w.|()^$\\*+?\-]{1,200}")
_SHOWN = 160


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """Ranks and scales, by module.

    Attributes:
        by_root: the scale is alpha / sqrt(rank), not alpha / rank (rsLoRA, arXiv:2312.03732).
        ranks: patterns of module names, the first that matches counts; so for `alphas`.
    """

    default_rank: int
    default_alpha: float
    by_root: bool
    ranks: tuple[tuple[re.Pattern[str] | str, int], ...]
    alphas: tuple[tuple[re.Pattern[str] | str, float], ...]

    def rank(self, module: str) -> int:
        """Rank of the additions to this module."""
        return next((rank for key, rank in self.ranks if _fits(key, module)), self.default_rank)

    def scale(self, module: str) -> float:
        """What they are multiplied by."""
        found = (alpha for key, alpha in self.alphas if _fits(key, module))
        rank = self.rank(module)
        return next(found, self.default_alpha) / (math.sqrt(rank) if self.by_root else rank)


def read_options(config: Mapping[str, Any], max_patterns: int) -> LoraOptions:
    """Check `adapter_config.json`.

    Args:
        max_patterns: most entries of a pattern table.

    Raises:
        Refused: an option is not supported, or has a value that makes no sense.
    """
    for key in config.keys() - _INERT - _READ:
        value = config[key]
        if value and value != _OFF.get(key):
            raise _refused(f"option {shown(key)} = {shown(repr(value))} is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_THE_MODEL.fullmatch(start):
        raise _refused(
            f"option init_lora_weights = {start} is not supported: it changes the model's own"
            " weights (PEFT converts: save_pretrained, path_initial_model_for_weight_conversion)"
        )
    by_root = config.get("use_rslora", False)
    if by_root not in (None, True, False):
        raise _refused(f"option use_rslora = {shown(repr(by_root))} is not true or false")
    return LoraOptions(
        default_rank=_rank("r", config.get("r", 8)),
        default_alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
        by_root=bool(by_root),
        ranks=tuple(_patterns(config, "rank_pattern", _rank, max_patterns)),
        alphas=tuple(_patterns(config, "alpha_pattern", _alpha, max_patterns)),
    )


def shown(text: str) -> str:
    """A word of a file for a message."""
    text = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return text if text.isprintable() else ascii(text)


def _rank(option: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise _refused(f"option {option} = {shown(repr(value))} is not a rank (1 to {_MAX_RANK})")
    return value


def _alpha(option: str, value: object) -> float:
    if type(value) not in (int, float) or not -1e9 <= value <= 1e9:  # type: ignore[operator]
        raise _refused(f"option {option} = {shown(repr(value))} is not a number of that size")
    return float(value)  # type: ignore[arg-type]


def _patterns(
    config: Mapping[str, Any], option: str, check: Callable[[str, object], T], most: int
) -> Iterator[tuple[re.Pattern[str] | str, T]]:
    """A table from patterns of module names to values."""
    table = config.get(option) or {}
    if not isinstance(table, dict) or len(table) > most:
        raise _refused(f"option {option} is not an object of at most {most} entries")
    num_expressions = 0
    for key, value in table.items():
        number = check(f"{option}: {shown(key)}", value)
        if _NAME.fullmatch(key):
            yield key, number
            continue
        num_expressions += 1
        yield _expression(option, key, num_expressions), number


def _expression(option: str, key: str, count: int) -> re.Pattern[str]:
    """A regular expression as PEFT reads it, if it is a harmless one."""
    repeated = len(re.findall(r"[*+?]", key))
    if (
        count > _MAX_EXPRESSIONS
        or repeated > 2
        or not _EXPRESSION.fullmatch(key)
        or re.search(r"\)[*+?]|\\\d", key)
    ):
        raise _refused(f"option {option}: pattern {shown(key)} is not supported")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error:
        raise _refused(f"option {option}: pattern {shown(key)} is malformed") from None


def _fits(key: re.Pattern[str] | str, module: str) -> bool:
    if isinstance(key, str):
        return module == key or module.endswith("." + key)
    return key.match(module) is not None


def _refused(message: str) -> Refused:
    return Refused(message, kind=AdapterKind.LORA)
