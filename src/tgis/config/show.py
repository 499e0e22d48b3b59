"""The table for people: `--help`, `--print-config` and the reference page."""

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from tgis.config.fields import FIELDS, IGNORED_FIELDS, Field, flag_of, variable_of
from tgis.config.parse import Program
from tgis.config.service import Config

_WIDTH, _INDENT = 100, 36


def explain(config: Config) -> str:
    """Each setting's value and where it came from, a line each."""
    rows = [
        (name, _value(getattr(config, name), field), config.origins.get(name, "default"))
        for name, field in FIELDS.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{n:{widths[0]}}  {v:{widths[1]}}  {o}" for n, v, o in rows)


def help_text(program: Program) -> str:
    """The answer to `--help`."""
    usage = f"{program.name} [MODEL] [settings]" if program.positional else program.name
    lines = [
        f"usage: {usage}",
        "",
        "Every setting is also an environment variable: --max-new-tokens is MAX_NEW_TOKENS.",
        "A flag beats the environment. Underscores and dashes are the same.",
    ]
    for group, fields in groups():
        lines += ["", f"{group}:"]
        for field in fields:
            lines += _help_lines(field, program)
    lines += ["", "Other:", _row("--print-config", "show every setting and where it comes from")]
    lines += [_row("-h, --help", "show this"), _row("-V, --version", "show the version")]
    return "\n".join(lines)


def groups() -> Iterator[tuple[str, list[Field]]]:
    """The fields of `Config` by group, in the order of the table."""
    names = dict.fromkeys(field.setting.group for field in FIELDS.values())
    for name in names:
        yield name, [field for field in FIELDS.values() if field.setting.group == name]


def reference() -> str:
    """The tables of the reference page, in Markdown."""
    lines = []
    for group, fields in groups():
        lines += ["", f"## {group}", ""]
        lines += ["| setting | default | value | meaning |", "|---|---|---|---|"]
        lines += [_reference_row(field) for field in fields]
    for title, is_refused in (("Accepted without any effect", False), ("Refused", True)):
        lines += ["", f"## {title}", "", "| setting | why |", "|---|---|"]
        for field in IGNORED_FIELDS.values():
            if bool(field.setting.not_yet) is is_refused:
                lines.append(f"| {_names(field)} | {field.setting.help or 'obsolete'} |")
    return "\n".join(lines[1:]) + "\n"


def _help_lines(field: Field, program: Program) -> Iterator[str]:
    if field.setting.env_only:
        names = variable_of(field.name)
    else:
        short = f"-{field.setting.short}, " if field.setting.short else ""
        names = short + flag_of(field.name)
    default = program.defaults.get(field.name, field.default)
    yield _row(names, f"{field.setting.help} [{_default(field, default)}]")


def _row(names: str, text: str) -> str:
    lines = wrap(text, _WIDTH - _INDENT, break_on_hyphens=False)
    return f"  {names:{_INDENT - 3}} " + ("\n" + " " * _INDENT).join(lines)


def _default(field: Field, default: Any) -> str:
    return field.setting.unset if _is_unset(default) else _value(default, field)


def _value(value: Any, field: Field) -> str:
    if _is_unset(value):
        return f"({field.setting.unset})"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_unset(value: Any) -> bool:
    return value is None or value == ""


def _names(field: Field) -> str:
    flags = [] if field.setting.env_only else [flag_of(name) for name in field.names]
    if field.setting.short:
        flags.append(f"-{field.setting.short}")
    return "<br>".join(f"`{name}`" for name in (*flags, *map(variable_of, field.names)))


def _reference_row(field: Field) -> str:
    setting = field.setting
    meaning = "; ".join(filter(None, (setting.help, setting.no_effect, setting.not_yet)))
    default = _default(field, field.default)
    default = default if _is_unset(field.default) else f"`{default}`"
    return f"| {_names(field)} | {default} | {field.rule} | {meaning} |"
