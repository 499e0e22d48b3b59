"""Typed, checked access to a model's `config.json`."""

from collections.abc import Mapping
from typing import Any, TypeVar

from tgis.errors import ModelError

T = TypeVar("T")
_REQUIRED: Any = object()


class ModelConfig:
    """`config.json` as a mapping whose getters name the key and the value that are wrong.

    A key that is absent or null has the default, if one is given. Several names may be tried: the
    first that is present counts.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self._where = where

    @property
    def model_type(self) -> str:
        """The name of the model's family."""
        return self.string("model_type")

    def has(self, name: str) -> bool:
        """Whether a key is present and not null."""
        return self._values.get(name) is not None

    def get(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The value of the first of `names` that is present.

        Raises:
            ModelError: none is, and there is no default.
        """
        for name in names:
            if self._values.get(name) is not None:
                return self._values[name]
        if default is _REQUIRED:
            raise ModelError(f"{self._where}: {' / '.join(names)} is missing")
        return default

    def size(self, *names: str, default: Any = _REQUIRED, most: int = 2**31 - 1) -> int:
        """An integer from 1 to `most`."""
        value = self.get(*names, default=default)
        if type(value) is not int or value < 1:
            raise self._wrong(names, value, "a positive integer")
        if value > most:
            raise self._wrong(names, value, f"at most {most}")
        return value

    def number(self, *names: str, default: Any = _REQUIRED, above: float | None = None) -> float:
        """A finite integer or float, greater than `above`."""
        value = self.get(*names, default=default)
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise self._wrong(names, value, "a number")
        if above is not None and value <= above:
            raise self._wrong(names, value, f"greater than {above:g}")
        return float(value)

    def strings(self, *names: str) -> list[str] | None:
        """A list of strings; None if absent."""
        value = self.get(*names, default=None)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        ):
            raise self._wrong(names, value, "a list of strings")
        return value

    def flag(self, *names: str, default: Any = _REQUIRED) -> bool:
        """A boolean."""
        value = self.get(*names, default=default)
        if type(value) is not bool:
            raise self._wrong(names, value, "true or false")
        return value

    def string(self, *names: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self.get(*names, default=default)
        if type(value) is not str:
            raise self._wrong(names, value, "a string")
        return value

    def choice(self, table: Mapping[str, T], *names: str, default: Any = _REQUIRED) -> T:
        """What `table` holds for a string value."""
        value = self.string(*names, default=default)
        if value not in table:
            raise self._wrong(names, value, f"supported (only {', '.join(table)})")
        return table[value]

    def section(self, *names: str) -> "ModelConfig":
        """A nested object; empty if absent."""
        value = self.get(*names, default={})
        if not isinstance(value, Mapping):
            raise self._wrong(names, value, "an object")
        return ModelConfig(value, f"{self._where}: {names[0]}")

    def require(self, name: str, expected: object) -> None:
        """Refuse a setting that would change the network in a way that is not supported.

        Absent is as good as `expected`.
        """
        value = self.get(name, default=expected)
        if value != expected:
            raise self._wrong((name,), value, f"supported (only {expected!r})")

    def _wrong(self, names: tuple[str, ...], value: object, wanted: str) -> ModelError:
        name = next((name for name in names if self.has(name)), names[0])
        return ModelError(f"{self._where}: {name} = {value!r:.99} is not {wanted}")
