"""What can be read of JSON that was cut off: a tool's input when the answer ended in the middle of it."""

from typing import Any

import msgspec

from zif.serving.json_text import read_json

CLOSERS = {"{": "}", "[": "]"}


def readable_members(text: str) -> dict[str, Any]:
    """Return the object that `text` is, or else as much of it as was written to the end.

    Members whose value is incomplete are left out; nothing is made up. Empty text, and text that is no object, gives
    an empty one. Numbers that no float holds stay as they were written. Linear in the text.
    """
    try:
        value = _value(text or "{}")
    except (ValueError, RecursionError):
        value = _readable(text)
    return value if isinstance(value, dict) else {}


def _value(text: str) -> Any:
    return read_json(text, lambda digits: msgspec.Raw(digits.encode()))


def _readable(text: str) -> Any:
    end, closers = _last_complete(text)
    try:
        return _value(text[:end] + closers)
    except (ValueError, RecursionError):
        return {}


def _last_complete(text: str) -> tuple[int, str]:
    """Return where the last complete member or element ends, and what closes all that is open there.

    Brackets that open or close move that place, so what is open there is what is open at the end.
    """
    closers: list[str] = []
    end = 0
    before = ""
    in_string = escaped = False
    for at, character in enumerate(text):
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
            if not in_string and (before == ":" or closers[-1:] == ["]"]):
                end = at + 1
        elif character == '"':
            in_string = True
        elif character in "{[}],:":
            before = character
            if character in CLOSERS:
                closers.append(CLOSERS[character])
            elif character in "}]" and closers:
                closers.pop()
            end = end if character == ":" else at + (character != ",")
    return end, "".join(reversed(closers))
