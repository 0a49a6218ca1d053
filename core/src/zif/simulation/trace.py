"""Recorded traffic: one JSON object per line, one line per request.

    {"arrival_s": 0.5, "prompt_tokens": 900, "output_tokens": 120, "prefix_id": "agent", "prefix_tokens": 640}

`arrival_s`, `prompt_tokens` and `output_tokens` are required. `prefix_id` and `prefix_tokens` go together: requests of
one id begin with the same tokens, as far as both reach; growing `prefix_tokens` under one id are the turns of a
conversation. `tenant` (default "") keeps prefixes apart between tenants; `priority` (default 0) counts under the policy
"priority", smaller first. Texts are not needed: nothing but lengths and shared beginnings decides what is reported.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from zif.errors import ConfigError

_REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line of a trace."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_id: str = ""
    prefix_tokens: int = 0
    tenant: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        _require(
            isinstance(self.arrival_s, int | float) and 0 <= self.arrival_s < math.inf, "arrival_s", self.arrival_s
        )
        _require(_whole(self.prompt_tokens, 1), "prompt_tokens", self.prompt_tokens)
        _require(_whole(self.output_tokens, 1), "output_tokens", self.output_tokens)
        _require(_whole(self.prefix_tokens, 0), "prefix_tokens", self.prefix_tokens)
        _require(_whole(self.priority, -(2**31)), "priority", self.priority)
        for name in ("prefix_id", "tenant"):
            _require(isinstance(getattr(self, name), str), name, getattr(self, name))
        if self.prefix_tokens > self.prompt_tokens:
            raise ConfigError(f"prefix_tokens={self.prefix_tokens} exceeds prompt_tokens={self.prompt_tokens}")
        if bool(self.prefix_id) != bool(self.prefix_tokens):
            raise ConfigError("prefix_id and prefix_tokens go together; give both or neither")


def read_trace(path: Path) -> list[TraceRequest]:
    """Read a trace, in order of arrival. Raises `ConfigError` with the line on anything that is not as documented."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {str(path)!r} cannot be read: {error}") from error
    requests = sorted(_requests(path, lines), key=lambda request: request.arrival_s)
    if not requests:
        raise ConfigError(f"trace {str(path)!r} holds no request; write one JSON object per line")
    return requests


def _requests(path: Path, lines: list[str]) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _request(json.loads(line))
        except (ConfigError, json.JSONDecodeError) as error:
            raise ConfigError(f"trace {str(path)!r}, line {number}: {error}") from error


def _request(entry: object) -> TraceRequest:
    known = [declared.name for declared in fields(TraceRequest)]
    if not isinstance(entry, dict):
        raise ConfigError(f"{entry!r} is no JSON object; write {{{', '.join(_REQUIRED)}, ...}}")
    if unknown := sorted(set(entry) - set(known)):
        raise ConfigError(f"{unknown[0]!r} is no field of a trace; the fields are {', '.join(known)}")
    if missing := [name for name in _REQUIRED if name not in entry]:
        raise ConfigError(f"{missing[0]!r} is missing")
    return TraceRequest(**cast("dict[str, Any]", entry))


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _require(condition: bool, name: str, value: object) -> None:
    if not condition or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is out of range or of the wrong type; see `zif simulate --help`")
