"""JSON text that a model wrote, or a caller sent within a string: read so that it can be written again.

Such text is the arguments of calls. `json.loads` takes more of it than JSON writers give back: halves of characters,
NaN, numbers that become infinite.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any

REPLACEMENT = "\ufffd"
_ESCAPE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a whole character
    r"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2}|[\ud800-\udfff])"  # half of one
    r"|\\.",
    re.DOTALL,
)


def read_json(text: str, far_number: Callable[[str], Any] | None = None) -> Any:
    """Return the value of a JSON text. Surrogates without their other half become U+FFFD, as no UTF-8 holds them.

    Integers are exact, of any size. `far_number` makes a value of the text of a number that no float holds; without
    it such a text is refused. Raises ValueError or RecursionError for what is no JSON, NaN and infinities included.
    """

    def number(digits: str) -> Any:
        value = float(digits)
        if math.isfinite(value):
            return value
        if far_number is None:
            raise ValueError(f"the number {digits[:20]} is too large")
        return far_number(digits)

    return json.loads(whole_characters(text), parse_float=number, parse_constant=_refuse)


def whole_characters(text: str) -> str:
    """Return a JSON text with U+FFFD in place of every surrogate, escaped or not, that is no part of a pair."""
    return _ESCAPE.sub(lambda found: REPLACEMENT if found[1] else found[0], text)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
