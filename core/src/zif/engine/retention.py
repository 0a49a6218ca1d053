"""How a caller says which parts of a prompt should stay cached: from loose values to checked `Retention`s."""

import math
from collections.abc import Mapping, Sequence

from zif.contract import Retention
from zif.errors import RequestError

MAX_PRIORITY = 100


def retention_of(value: object) -> tuple[Retention, ...]:
    """Read a list of {"priority": 0 to 100} with optional "start", "end" and "duration_s"; nothing when None.

    Raises `RequestError` on anything else.
    """
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RequestError(f"retention={value!r} must be a list, such as [{{'priority': 80, 'end': 1024}}]")
    return tuple(_one(entry) for entry in value)


def _one(entry: object) -> Retention:
    if not isinstance(entry, Mapping) or "priority" not in entry:
        raise RequestError(f"retention holds {entry!r}; each entry is a mapping with 'priority'")
    unknown = set(entry) - {"priority", "start", "end", "duration_s"}
    if unknown:
        raise RequestError(f"retention has keys {sorted(map(str, unknown))} that are not supported")
    start, end = _integer(entry, "start", 0), entry.get("end")
    if end is not None and _integer(entry, "end", 0) <= start:
        raise RequestError(
            f"retention: end={end!r} must be greater than start={start!r}; None reaches to the last token"
        )
    priority = _integer(entry, "priority", 0)
    if priority > MAX_PRIORITY:
        raise RequestError(f"retention: priority={priority!r} is out of range; give 0 to {MAX_PRIORITY}")
    return Retention(priority, start, end, _duration_s(entry.get("duration_s")))


def _integer(entry: Mapping[str, object], name: str, default: int) -> int:
    value = entry.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RequestError(f"retention: {name}={value!r} must be an integer of at least 0")
    return value


def _duration_s(value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise RequestError(f"retention: duration_s={value!r} must be a number of seconds; leave it out for no end")
    return float(value)
