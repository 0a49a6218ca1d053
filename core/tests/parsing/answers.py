"""Answers for tests of the parser: cut in any way, and written by the formats' own writer."""

import json
import random
from itertools import pairwise

from zif.parsing.events import TextPiece, ToolCallArguments, ToolCallBegin, ToolCallEnd
from zif.parsing.formats import format_names, load_format
from zif.parsing.parser import Parser
from zif.parsing.pieces import merged
from zif.parsing.writing import WrittenCall, write_answer

FORMATS = format_names()
CALLING = [name for name in FORMATS if load_format(name).has_calls]
REASONING = [name for name in FORMATS if load_format(name).reasoning is not None]

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "hourly": {"type": "boolean"},
        "where": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/Place"}]},
        "any": {},
    },
    "$defs": {"Place": {"type": "object"}},
}
TOOLS = {"get_weather": SCHEMA, "f": None}


def parse(name, pieces, tools=TOOLS, **options):
    """Return the merged events of an answer that comes in `pieces`, or whole if it is one string."""
    parser = Parser(load_format(name), tools, **options)
    events = []
    for piece in [pieces] if isinstance(pieces, str) else pieces:
        events += parser.feed(piece)
    return merged(events + parser.finish())


def cut_at(text, places):
    """Cut a text at some places, which may be given twice."""
    ends = [0, *sorted(places), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


def markers_of(name):
    """Return all markers of a format."""
    states = load_format(name).states.values()
    return sorted({marker for state in states for marker in state.markers.targets} or {"<think>"})


def calls_of(events):
    """Return (name, arguments, whether whole) of each call."""
    calls = {}
    for event in events:
        if isinstance(event, ToolCallBegin):
            calls[event.index] = [event.name, "", False]
        elif isinstance(event, ToolCallArguments):
            calls[event.index][1] += event.text
        elif isinstance(event, ToolCallEnd):
            calls[event.index][2] = True
    assert list(calls) == list(range(len(calls)))
    return [tuple(call) for call in calls.values()]


def text_of(events):
    """Return the text that the user reads."""
    return "".join(event.text for event in events if isinstance(event, TextPiece))


def random_answer(name, generator: random.Random):
    """Write a random answer of a family, sometimes damaged; the alphabet is what markers and JSON are made of."""
    form = load_format(name)
    alphabet = [*markers_of(name), *'{}[]":,\\ \n<>|/a1é\U0001f600\x00', '{"name": "f", "arguments": {', '"a": 1}}']
    if generator.random() < 0.4:
        return "".join(generator.choice(alphabet) for _ in range(generator.randrange(40)))
    noise = "".join(generator.choice(alphabet) for _ in range(generator.randrange(6)))
    arguments = {key: generator.choice([noise, 3, True, None, [1, {"b": noise}]]) for key in ("city", "days", "any")}
    calls = [WrittenCall("get_weather", json.dumps(arguments)), WrittenCall("f", "{}")][: generator.randrange(3)]
    reasoning = noise if form.reasoning and generator.random() < 0.5 else ""
    answer = write_answer(form, generator.choice(["", "Hi.", noise]), reasoning, calls if form.has_calls else [])
    at = generator.randrange(len(answer) + 1)
    damages = [answer, answer[:at], answer[:at] + noise + answer[at:], answer[:at] + answer[at + 1 :], answer + answer]
    return generator.choice(damages)
