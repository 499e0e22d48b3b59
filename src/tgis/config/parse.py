"""From command line and environment to a `Config`, or one `ConfigError`.

A flag beats the environment; an empty environment variable is not set.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from tgis.config.derive import Draft, complete
from tgis.config.fields import FIELDS, IGNORED_FIELDS, Field, flag_of, place, variable_of
from tgis.config.service import Config, Note
from tgis.config.setting import BOOLEANS, one_line
from tgis.errors import ConfigError


class Program(NamedTuple):
    """A command that takes the settings, and the defaults that it has of its own."""

    name: str
    defaults: dict[str, Any]
    positional: str | None = None  # the setting that a lone argument is


SERVE = Program("tgis serve", {}, positional="model_name")
LAUNCHER = Program(
    "text-generation-launcher", {"model_name": "bigscience/bloom-560m", "host": "0.0.0.0"}
)


class Given(NamedTuple):
    """A value as text, and where it was found."""

    text: str
    origin: str  # "--port", "PORT"

    def where(self, field: Field) -> str:
        """How a message about it begins."""
        return place(field, self.text, self.origin)


def parse(argv: Sequence[str], environ: Mapping[str, str], program: Program = SERVE) -> Config:
    """Read every setting.

    Args:
        argv: the arguments after the program's name.
        environ: the environment.
        program: whose defaults apply.

    Raises:
        ConfigError: a setting is unknown, malformed, out of range or contradicts another; one
            line that names flag, value and what is expected.
    """
    flags = _scan(argv, program)
    values: dict[str, Any] = dict(program.defaults)
    origins: dict[str, str] = {}
    notes: list[Note] = []
    for field in FIELDS.values():
        found = _read(field, flags, environ)
        if found is not None:
            values[field.name], given = found
            origins[field.name] = given.origin
            if field.setting.no_effect:
                notes.append(_ignored(field, given))
    for field in IGNORED_FIELDS.values():
        if (found := _read(field, flags, environ)) is not None:
            if why := field.setting.not_yet:
                raise ConfigError(f"{found[1].where(field)}: {why}; leave it unset")
            notes.append(_ignored(field, found[1]))
    draft = Draft(values, origins, environ, notes)
    complete(draft)
    _refuse_unsupported(draft)
    return Config(**values, origins=origins, notes=tuple(notes))


def termination_log_path(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """Where the reason of a failure goes when the other settings may be wrong."""
    field = FIELDS["termination_log"]
    flags = [flag_of(name) for name in field.names]
    for word, following in pairwise([*argv, ""]):
        flag, _, value = word.partition("=")
        if flag.replace("_", "-") in flags and (value or following):
            return value or following
    variables = (environ.get(variable_of(name), "").strip() for name in field.names)
    return str(next(filter(None, variables), field.default))


def _refuse_unsupported(draft: Draft) -> None:
    """What is not there yet is refused, never ignored."""
    for name in draft.origins:
        if (why := FIELDS[name].setting.not_yet) and draft.get(name):
            raise ConfigError(f"{draft.where(name)}: {why}; leave it unset")


def _flag_table() -> dict[str, tuple[Field, str]]:
    table: dict[str, tuple[Field, str]] = {}
    for field in (*FIELDS.values(), *IGNORED_FIELDS.values()):
        if not field.setting.env_only:
            table |= {flag_of(name): (field, name) for name in field.names}
            if field.is_bool:
                table["--no-" + flag_of(field.name)[2:]] = (field, field.name)
            if field.setting.short:
                table["-" + field.setting.short] = (field, field.name)
    return table


def _scan(argv: Sequence[str], program: Program) -> dict[str, Given]:
    """The flags of a command line: name of setting or alias -> its text."""
    table = _flag_table()
    found: dict[str, Given] = {}
    rest = iter(enumerate(argv))
    for index, word in rest:
        if not word.startswith("-") or word == "-":
            if program.positional is None:
                raise ConfigError(f"{one_line(word)}: unexpected argument; settings are flags")
            name, given = program.positional, Given(word, flag_of(program.positional))
        else:
            following = argv[index + 1] if index + 1 < len(argv) else None
            name, given, used = _flag(word, following, table)
            if used:
                next(rest)
        earlier = found.setdefault(name, given)
        if earlier.text != given.text:
            raise ConfigError(
                f"{given.origin}={one_line(given.text)}: already given as {one_line(earlier.text)};"
                " give it once"
            )
    return found


def _flag(
    word: str, following: str | None, table: dict[str, tuple[Field, str]]
) -> tuple[str, Given, bool]:
    """Split one flag: its setting or alias, its text, and whether `following` was used up."""
    flag, equals, text = word.partition("=")
    flag = flag.replace("_", "-")
    if not word.startswith("--") and len(flag) > 2:  # -p3000
        flag, equals, text = flag[:2], "=", word[2:]
    if flag not in table:
        raise ConfigError(_unknown(flag, table))
    field, name = table[flag]
    if flag.startswith("--no-"):
        if equals:
            raise ConfigError(f"{flag}: takes no value; expected {flag_of(name)}={one_line(text)}")
        return name, Given("false", flag), False
    if field.is_bool and not equals:
        used = following is not None and following.lower() in BOOLEANS
        return name, Given(following if used and following else "true", flag), used
    if equals:
        return name, Given(text, flag), False
    if following is None or following.startswith("--"):
        raise ConfigError(f"{flag}: has no value; expected {field.rule}")
    return name, Given(following, flag), True


def _unknown(flag: str, table: dict[str, tuple[Field, str]]) -> str:
    from difflib import get_close_matches  # costs 5 ms that only an error should pay

    close = get_close_matches(flag, table, n=1, cutoff=0.7)
    hint = f"did you mean {close[0]}?" if close else "--help lists all settings"
    return f"{one_line(flag)}: unknown setting; {hint}"


def _givens(
    field: Field, flags: Mapping[str, Given], environ: Mapping[str, str]
) -> Iterator[tuple[str, Given]]:
    """Each name under which the setting was given, with the flag before the variable."""
    for name in field.names:
        variable = variable_of(name)
        text = environ.get(variable, "")
        if name in flags:
            yield name, flags[name]
        elif text.strip():
            yield name, Given(text, variable)


def _read(
    field: Field, flags: Mapping[str, Given], environ: Mapping[str, str]
) -> tuple[Any, Given] | None:
    """The setting's value, if it was given; all names under which it was must agree."""
    first: tuple[Any, Given] | None = None
    for name, given in _givens(field, flags, environ):
        value = _value(field, given)
        if first is None:
            first = value, given
        elif value != first[0]:
            raise ConfigError(_differ(field, name, first[1], given))
    return first


def _value(field: Field, given: Given) -> Any:
    where, check = given.where(field), field.setting.check
    try:
        value = field.kind.read(given.text)
    except (ValueError, KeyError, IndexError):
        text = field.kind.text.format(v=one_line(given.text))
        raise ConfigError(f"{where}: {text}; expected {field.rule}") from None
    if check and value is not None and not check.holds(value):
        text = check.text.format(v=one_line(given.text))
        raise ConfigError(f"{where}: {text}; expected {check.rule}")
    return value


def _differ(field: Field, name: str, first: Given, second: Given) -> str:
    text = field.setting.aliases[name] or "set to different values"
    text = text.format(a=first.origin, b=second.origin, va=first.text, vb=second.text)
    return f"{first.where(field)} and {second.where(field)}: {one_line(text)}; set one of them"


def _ignored(field: Field, given: Given) -> Note:
    """The line about a setting that changes nothing."""
    text = f"{given.origin} is set to {one_line(given.text)} but this parameter will be ignored."
    reason = field.setting.no_effect
    if not reason:
        return Note("warning", text)
    level: Literal["info", "warning"] = "warning" if field.name in FIELDS else "info"
    return Note(level, f"{text} Reason: {reason}.")
