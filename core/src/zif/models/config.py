"""Typed reading of a checkpoint's `config.json`.

Knows how to read and check values, not what they mean for a family. Used by the family builders and by
`zif.models.rope_config`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zif.errors import CheckpointError, ModelError

_OFF_VALUES: tuple[object, ...] = (None, False, 0, 1.0, [], {}, "")
"""Values under which a switch that no builder reads changes nothing: off, absent, or a neutral factor."""


def load_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a model folder. Raises `CheckpointError` when there is none or it is not an object."""
    if not folder.is_dir():
        raise CheckpointError(
            f"model folder {str(folder)!r} does not exist; give a folder that holds config.json and safetensors files"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"no config.json in {str(folder)!r}; give the folder that save_pretrained wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(config).__name__}, not an object; download it again")
    return config


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """The values of one configuration object. `owner` says in messages whose they are."""

    values: Mapping[str, Any]
    owner: str

    def has(self, key: str) -> bool:
        """Say whether `key` is there and not null."""
        return self.values.get(key) is not None

    def count(self, key: str, default: int | None = None) -> int:
        """Read a positive integer. Raises `ModelError` when it is missing without a default, or something else."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self._missing(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a positive integer")
        return value

    def count_or_zero(self, key: str, default: int) -> int:
        """Read an integer that is not negative."""
        value = self.values.get(key)
        return 0 if type(value) is int and value == 0 else self.count(key, default)

    def optional_count(self, key: str) -> int | None:
        """Read a positive integer, None when absent or null."""
        return self.count(key) if self.has(key) else None

    def number(self, key: str, default: float | None = None) -> float:
        """Read a positive finite number. Raises like `count`."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self._missing(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(key, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Read a positive finite number, None when absent or null."""
        return self.number(key) if self.has(key) else None

    def flag(self, key: str, default: bool) -> bool:
        """Read a boolean."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Read a string."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self._missing(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def entries(self, key: str) -> tuple[Any, ...] | None:
        """Read a list, None when absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.wrong(key, "a list")
        return tuple(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """Read a list of `length` positive numbers."""
        values = self.entries(key)
        if values is None:
            raise self._missing(key)
        good = all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf for v in values)
        if not good or len(values) != length:
            raise self.wrong(key, f"a list of {length} positive numbers")
        return tuple(float(v) for v in values)

    def section(self, key: str) -> "ConfigReader | None":
        """Read a nested object, None when absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return ConfigReader(value, f"{self.owner} {key}")

    def refuse_switched_on(self, keys: tuple[str, ...]) -> None:
        """Raise `ModelError` for the first of `keys` that is set to anything but off."""
        for key in keys:
            value = self.values.get(key)
            if value is True or all(value != off for off in _OFF_VALUES):
                raise ModelError(
                    f"{self.owner}: {key}={value!r} is not implemented by the native decoder; "
                    f"use implementation='transformers'"
                )

    def wrong(self, key: str, expected: str) -> ModelError:
        """Make the error about a value that is not what it must be."""
        return ModelError(f"{self.owner}: {key}={self.values.get(key)!r} must be {expected}; correct config.json")

    def _missing(self, key: str) -> ModelError:
        return ModelError(f"{self.owner}: {key} is missing and has no default; correct config.json")
