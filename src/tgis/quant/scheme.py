"""How a checkpoint's weights are quantised: `quantization_config`, checked against the headers.

Nothing of the weights is read here: what is refused is refused before memory is spent.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tgis.errors import ModelError

_WORD = 32  # bits of the integers that values are packed into
_CONFIG = "quantization_config"
SUFFIX = ".qweight"


class Info(Protocol):
    """Header of a stored tensor, such as `hub.headers.TensorInfo`."""

    @property
    def dtype(self) -> str:
        """As the file format names it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stored tensor."""


Headers = Mapping[str, Info]


@dataclass(frozen=True, slots=True)
class Scheme:
    """What all quantised weights of a checkpoint have in common."""

    method: str  # "gptq" or "awq"
    bits: int
    group_size: int  # input features of a group; -1 = all
    zero_offset: int = 0  # is added to stored zero points

    @property
    def per_word(self) -> int:
        """Values in a stored integer."""
        return _WORD // self.bits

    def groups(self, in_features: int) -> int:
        """Groups of a weight."""
        return 1 if self.group_size < 0 else -(-in_features // self.group_size)


def read_scheme(config: Mapping[str, Any] | None, headers: Headers) -> Scheme | None:
    """The scheme of a checkpoint; None if its weights are not quantised.

    Args:
        config: `quantization_config` of config.json, or quantize_config.json.
        headers: of all stored tensors, by name.

    Raises:
        ModelError: a method, an option or a layout that is not supported, or tensors that are not
            as the configuration says; the message names the key or the tensor.
    """
    quantised = [name.removesuffix(SUFFIX) for name in headers if name.endswith(SUFFIX)]
    if config is None:
        if not quantised:
            return None
        raise ModelError(
            f"weight {quantised[0]}{SUFFIX} is quantised, but neither {_CONFIG} in config.json nor"
            " quantize_config.json says how"
        )
    method = config.get("quant_method", "gptq")
    if method not in METHODS:
        raise _wrong("quant_method", method, f"supported (only {', '.join(METHODS)})")
    read, check = METHODS[method]
    scheme = read(config)
    if not quantised:
        raise ModelError(
            f"{_CONFIG}: quant_method = {method}, but no weight is stored as *{SUFFIX}"
        )
    for name in sorted(quantised):
        check(scheme, name, headers)
    return scheme


def _gptq(config: Mapping[str, Any]) -> Scheme:
    version = config.get("checkpoint_format", "gptq")
    if version not in ZERO_OFFSETS:
        raise _wrong("checkpoint_format", version, f"supported (only {', '.join(ZERO_OFFSETS)})")
    return Scheme(
        "gptq", _choice(config, "bits", (4, 8)), _group_size(config), ZERO_OFFSETS[version]
    )


# The first version of the format stores zero points minus one.
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""`checkpoint_format` -> what is added to stored zero points."""


def _awq(config: Mapping[str, Any]) -> Scheme:
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise _wrong("version", version, "supported (only gemm)")
    return Scheme("awq", _choice(config, "bits", (4,)), _group_size(config))


def _choice(config: Mapping[str, Any], key: str, known: tuple[int, ...]) -> int:
    value = config.get(key)
    if type(value) is not int or value not in known:
        raise _wrong(key, value, f"supported (only {', '.join(map(str, known))})")
    return value


def _group_size(config: Mapping[str, Any]) -> int:
    value = config.get("group_size")
    if type(value) is not int or not (value == -1 or 1 <= value < 2**31):
        raise _wrong("group_size", value, "a positive integer or -1")
    return value


def _wrong(key: str, value: object, wanted: str) -> ModelError:
    return ModelError(f"{_CONFIG}: {key} = {value!r:.99} is not {wanted}")


def _check_gptq(scheme: Scheme, name: str, headers: Headers) -> None:
    words, out = _matrix(name + SUFFIX, headers, ("I32",))
    (features,) = _shape(f"{name}.g_idx", headers, ("I32", "I64"), 1)
    if words * scheme.per_word != features + -features % scheme.per_word:
        raise ModelError(
            f"weight {name}{SUFFIX} of shape {[words, out]} does not hold the {features} input"
            f" features of {name}.g_idx in {scheme.bits} bits each, as {_CONFIG}: bits says"
        )
    _check_groups(scheme, name, headers, features, out)


def _check_awq(scheme: Scheme, name: str, headers: Headers) -> None:
    features, words = _matrix(name + SUFFIX, headers, ("I32",))
    _check_groups(scheme, name, headers, features, words * scheme.per_word)


def _check_groups(scheme: Scheme, name: str, headers: Headers, features: int, out: int) -> None:
    groups, columns = _matrix(f"{name}.scales", headers, ("F16", "BF16", "F32"))
    if groups != scheme.groups(features):
        raise ModelError(
            f"weight {name}.scales has {groups} groups, but {_CONFIG}: group_size ="
            f" {scheme.group_size} makes {scheme.groups(features)} of {features} input features"
        )
    zeros = _matrix(f"{name}.qzeros", headers, ("I32",))
    expected = (groups, -(-out // scheme.per_word))
    if columns != out or zeros != expected:
        wrong = ".scales" if columns != out else ".qzeros"
        right = (groups, out) if columns != out else expected
        raise ModelError(
            f"weight {name}{wrong} has shape {list(headers[name + wrong].shape)}, but"
            f" {name}{SUFFIX} with {scheme.bits} bits asks for {list(right)}"
        )


def _matrix(name: str, headers: Headers, dtypes: Iterable[str]) -> tuple[int, int]:
    rows, columns = _shape(name, headers, dtypes, 2)
    return rows, columns


def _shape(name: str, headers: Headers, dtypes: Iterable[str], dims: int) -> tuple[int, ...]:
    """The shape of a stored tensor that must be of one of these types.

    Raises:
        ModelError: it is not there, or is something else.
    """
    if name not in headers:
        raise ModelError(f"weight {name} does not exist")
    info = headers[name]
    if info.dtype not in dtypes or len(info.shape) != dims:
        raise ModelError(
            f"weight {name} is {info.dtype} {list(info.shape)}, but must be"
            f" {' or '.join(dtypes)} with {dims} dimension{'s' * (dims > 1)}"
        )
    return info.shape


Check = Callable[[Scheme, str, Headers], None]

METHODS: dict[str, tuple[Callable[[Mapping[str, Any]], Scheme], Check]] = {
    "gptq": (_gptq, _check_gptq),
    "awq": (_awq, _check_awq),
}
"""`quant_method` -> how its configuration is read, how the headers of a weight are checked."""
