"""Tile sizes and compiler options of kernels, as data: nothing is tuned in front of a request.

A table maps a kernel's name to rules; the first rule whose bounds hold gives the configuration:

    {"rms_norm": [{"when": {"columns": [1, 1024]}, "tiles": {"ROWS": 4}, "num_warps": 4},
                  {"tiles": {"ROWS": 1}, "num_warps": 8}]}

`tuning/default` serves every architecture; a vendor lays folders of its own over it. `zif.kernels.regenerate` writes
such tables from measurements.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zif.errors import ConfigError

DEFAULT_FOLDER = Path(__file__).parent / "tuning" / "default"
INTERPRETER_FOLDER = Path(__file__).parent / "tuning" / "interpreter"

_FIELDS = {"when", "tiles", "num_warps", "num_stages", "options"}


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How one kernel is compiled. `tiles` are compile-time constants, `options` what only one compiler knows."""

    tiles: tuple[tuple[str, int], ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    options: tuple[tuple[str, int | str | bool], ...] = ()

    def __getitem__(self, tile: str) -> int:
        return dict(self.tiles)[tile]

    def compiler_options(self) -> dict[str, int | str | bool]:
        """Return what the compiler is given besides the kernel's arguments."""
        # Stated, because compilers are about to change what they do by default.
        fusion = {"enable_fp_fusion": True}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **fusion, **dict(self.options)}


@dataclass(frozen=True, slots=True)
class Rule:
    """A configuration and where it serves: for each named quantity the lowest and the highest value, inclusive."""

    when: tuple[tuple[str, int, int], ...]
    config: LaunchConfig

    def holds(self, quantities: Mapping[str, int]) -> bool:
        """Say whether the rule serves these quantities. A quantity that a rule names and the call does not is 0."""
        return all(low <= quantities.get(name, 0) <= high for name, low, high in self.when)


class Tuning:
    """The rules of one architecture: those of the first folder that has any for a kernel and holds, serve."""

    def __init__(self, tables: Sequence[Mapping[str, Sequence[Rule]]]) -> None:
        self._tables = tuple(tables)
        self._config = functools.lru_cache(maxsize=4096)(self._find)

    @classmethod
    def read(cls, *folders: Path) -> "Tuning":
        """Read tables, the most specific folder first; the default tables come last. Raises `ConfigError`."""
        return cls([_read_folder(folder) for folder in (*folders, DEFAULT_FOLDER)])

    def config(self, kernel: str, **quantities: int) -> LaunchConfig:
        """Return the configuration of a kernel for these quantities. Raises `ConfigError` when no rule holds."""
        return self._config(kernel, tuple(sorted(quantities.items())))

    def kernels(self) -> frozenset[str]:
        """Return the names that have rules."""
        return frozenset(name for table in self._tables for name in table)

    def _find(self, kernel: str, quantities: tuple[tuple[str, int], ...]) -> LaunchConfig:
        known = dict(quantities)
        for table in self._tables:
            for rule in table.get(kernel, ()):
                if rule.holds(known):
                    return rule.config
        raise ConfigError(f"no tuning rule of kernel {kernel!r} holds for {known}; add one to its default table")


def _read_folder(folder: Path) -> Mapping[str, Sequence[Rule]]:
    rules: dict[str, Sequence[Rule]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            rules |= {kernel: [_rule(entry) for entry in entries] for kernel, entries in table.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"tuning table {path} cannot be read: {error}; write it anew") from error
    return rules


def _rule(entry: Mapping[str, Any]) -> Rule:
    if unknown := entry.keys() - _FIELDS:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    when = tuple((name, int(low), int(high)) for name, (low, high) in entry.get("when", {}).items())
    config = LaunchConfig(
        tiles=tuple((name, int(size)) for name, size in entry.get("tiles", {}).items()),
        num_warps=int(entry.get("num_warps", 4)),
        num_stages=int(entry.get("num_stages", 2)),
        options=tuple(entry.get("options", {}).items()),
    )
    return Rule(when, config)
