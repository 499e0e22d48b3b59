"""The table as data: what can be given, under which names, and how it is read."""

from typing import Any, NamedTuple, get_args, get_type_hints

from tgis.config.ignored import IGNORED
from tgis.config.service import Config
from tgis.config.setting import Kind, Setting, one_line, setting_kind

_NOT_SETTINGS = ("origins", "notes")
NOTHING = "Accepted without any effect"


class Field(NamedTuple):
    """One row of the table."""

    name: str
    setting: Setting
    kind: Kind
    is_bool: bool
    default: Any  # None for what has no effect

    @property
    def names(self) -> tuple[str, ...]:
        """The field's own name and its aliases, with underscores."""
        return (self.name, *self.setting.aliases)

    @property
    def rule(self) -> str:
        """What completes "expected ..."."""
        return self.setting.check.rule if self.setting.check else self.kind.rule


def flag_of(name: str) -> str:
    """The flag of a setting or alias."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """The environment variable of a setting or alias."""
    return name.upper()


def place(field: Field, text: str, origin: str) -> str:
    """How a message begins: flag and value, and the environment variable if it was one."""
    text = one_line(text)
    if origin.startswith("-") or (field.setting.env_only and origin):
        return f"{origin}={text}"
    source = f" (environment variable {origin})" if origin else ""
    return f"{flag_of(field.name)}={text}{source}"


def _config_fields() -> list[Field]:
    hints = get_type_hints(Config, include_extras=True)
    fields = []
    for name, default in zip(Config.__struct_fields__, Config.__struct_defaults__, strict=True):
        if name not in _NOT_SETTINGS:
            annotation, setting = get_args(hints[name])
            kind = setting_kind(annotation, setting)
            fields.append(Field(name, setting, kind, annotation is bool, default))
    return fields


def _ignored_fields() -> list[Field]:
    fields = []
    for name, (annotation, why, env_only, refused) in IGNORED.items():
        no_effect, not_yet = ("", why) if refused else (why, "")
        setting = Setting(NOTHING, why, env_only=env_only, no_effect=no_effect, not_yet=not_yet)
        kind = setting_kind(annotation, setting)
        fields.append(Field(name, setting, kind, annotation is bool, None))
    return fields


FIELDS: dict[str, Field] = {field.name: field for field in _config_fields()}
IGNORED_FIELDS: dict[str, Field] = {field.name: field for field in _ignored_fields()}
