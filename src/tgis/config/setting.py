"""What a setting is: its names, its kind, its rule; and how its text becomes a value."""

import math
import os
import re
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import msgspec


class Kind(NamedTuple):
    """A way to read text: `rule` completes "expected ..."; `read` raises ValueError or KeyError.

    `text` is TGIS's own message where it has one, with `{v}` for the text.
    """

    rule: str
    read: Callable[[str], Any]
    text: str = "not valid"


class Check(NamedTuple):
    """A limit on a value that could be read.

    `rule` completes "expected ..."; `text` is TGIS's own message where it has one, with `{v}` for
    the value.
    """

    rule: str
    holds: Callable[[Any], bool]
    text: str = "out of range"


class Setting(msgspec.Struct, frozen=True):
    """Everything about a setting but its name, its type and its default.

    A setting `max_new_tokens` is the flag `--max-new-tokens` and the environment variable
    `MAX_NEW_TOKENS`; every alias likewise.
    """

    group: str
    help: str  # one line
    kind: Kind | None = None  # None = by the type
    check: Check | None = None
    short: str = ""  # one-letter flag
    aliases: dict[str, str] = msgspec.field(
        default_factory=dict
    )  # other name -> what is said when both differ ("" = ours)
    unset: str = ""  # what happens when it is not set, for a default of None
    env_only: bool = False
    no_effect: str = ""  # why setting it changes nothing
    not_yet: str = ""  # why setting it is refused


def setting_kind(annotation: Any, setting: Setting) -> Kind:
    """How the setting's text is read: its own kind, else that of its type."""
    if setting.kind is not None:
        return setting.kind
    if get_origin(annotation) is Literal:
        return choice({name: name for name in get_args(annotation)})
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not NoneType)
        return setting_kind(annotation, setting)
    return KINDS[annotation]


def _read_bool(text: str) -> bool:
    return BOOLEANS[text.strip().lower()]


def _read_int(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text.strip()):
        raise ValueError
    return int(text)


def _read_float(text: str) -> float:
    if not re.fullmatch(r"[-+0-9.eE]{1,60}", text.strip()):  # no nan, inf or 1_0
        raise ValueError
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _read_text(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError
    return text


_UNITS = {"": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
}


def _read_size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in _UNITS:
        raise ValueError
    return int(float(match[1]) * _UNITS[match[2]])


BOOLEANS = dict.fromkeys(("true", "1", "yes"), True) | dict.fromkeys(("false", "0", "no"), False)
KINDS: dict[Any, Kind] = {
    bool: Kind("true or false", _read_bool),
    int: Kind("an integer", _read_int),
    float: Kind("a number", _read_float),
    str: Kind("printable text", _read_text),
}
SIZE = Kind("a number of bytes such as 4GiB, 512MiB or 1000000", _read_size)


def choice(values: dict[str, Any], text: str = "not valid") -> Kind:
    """One of some words in any case, each with its value."""
    return Kind("one of " + ", ".join(values), lambda v: values[v.strip().lower()], text)


def at_least(low: int, text: str = "out of range") -> Check:
    """An integer from `low` on."""
    return Check(f"an integer from {low} to {_MAX_INT}", lambda v: low <= v <= _MAX_INT, text)


def between(low: float, high: float, text: str = "out of range", noun: str = "a number") -> Check:
    """A number in a closed range."""
    return Check(f"{noun} from {low} to {high}", lambda v: low <= v <= high, text)


_MAX_INT = 2**31 - 1
PORT = between(0, 65535, noun="a port number")
SECONDS = between(0.1, 86400, noun="a number of seconds")


def _is_host(text: str) -> bool:
    name = re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252})", text)
    return bool(name) or (":" in text[:6] and bool(re.fullmatch(r"[0-9A-Fa-f:.]{2,45}", text)))


HOST = Check("a host name or an IP address, without a port", _is_host)


def readable(path: str) -> bool:
    """Whether the path is a file that this process may read."""
    return os.path.isfile(path) and os.access(path, os.R_OK)


def readable_file(what: str) -> Check:
    """A path of a file that can be read."""
    return Check("the path of a readable file", readable, f"couldn't load {what} from {{v}}")


def one_line(text: str, limit: int = 200) -> str:
    """User text for a message: printable, on one line, cut; quoted where it would not be seen."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return cut if cut.isprintable() and cut.strip() == cut and cut else ascii(cut)
