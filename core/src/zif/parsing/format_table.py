"""Checked reading of one TOML table: each key once, of its kind, and none that nobody asked for."""

from collections.abc import Mapping
from typing import Any

from zif.errors import ConfigError


class FormatTable:
    """One table of a format file. `where` names file and table in errors, which are all ConfigErrors."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self._values = dict(values)

    def text(self, key: str, default: str | None = None) -> str:
        """Take a string; without a default the key must be there."""
        if key not in self._values and default is None:
            raise ConfigError(f"{self.where} has no key {key!r}; add it, as a string")
        return str(self._take(key, str, default, "a string"))

    def flag(self, key: str) -> bool:
        """Take true or false; false where the key is missing."""
        return bool(self._take(key, bool, False, "true or false"))

    def texts(self, key: str) -> tuple[str, ...]:
        """Take a list of strings; empty where the key is missing."""
        values = self._take(key, list, [], "a list of strings")
        if not all(isinstance(value, str) for value in values):
            raise ConfigError(f"{self.where}: {key} = {values!r} must be a list of strings")
        return tuple(values)

    def text_by_text(self, key: str) -> dict[str, str]:
        """Take a table of strings; empty where the key is missing."""
        values = self._take(key, dict, {}, "a table of strings")
        if not all(isinstance(value, str) for value in values.values()):
            raise ConfigError(f"{self.where}: {key} = {values!r} must give a string for each key")
        return dict(values)

    def table(self, key: str) -> "FormatTable":
        """Take a table."""
        if key not in self._values:
            raise ConfigError(f"{self.where} has no table {key!r}; add it")
        return self._inner(key, self._values.pop(key))

    def tables(self, key: str) -> "dict[str, FormatTable]":
        """Take a table of tables."""
        values = self._take(key, dict, {}, "a table of tables")
        return {name: self._inner(f"{key}.{name}", value) for name, value in values.items()}

    def list_of_tables(self, key: str) -> "list[FormatTable]":
        """Take a list of tables; empty where the key is missing."""
        values = self._take(key, list, [], "a list of tables")
        return [self._inner(f"{key}[{index}]", value) for index, value in enumerate(values)]

    def done(self) -> None:
        """Refuse what is left."""
        if self._values:
            raise ConfigError(f"{self.where} has the key {next(iter(self._values))!r}, which means nothing there")

    def _inner(self, name: str, value: object) -> "FormatTable":
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: {name} = {value!r} must be a table")
        return FormatTable(f"{self.where}: {name}", value)

    def _take(self, key: str, kind: type, default: Any, wanted: str) -> Any:
        value = self._values.pop(key, default)
        if not isinstance(value, kind):
            raise ConfigError(f"{self.where}: {key} = {value!r} must be {wanted}")
        return value
