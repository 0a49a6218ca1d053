"""The parser: one answer, taken apart as it arrives, by the states of a format.

What it gives does not depend on how the answer was cut: every decision hangs on the text alone, and text about which
nothing can be decided yet is held back. Held are a possible begin of a marker with the blanks before it, and an attempt
at a call whose tool is not known yet; both are bounded. Time is linear in the answer.

    parser = Parser(load_format("hermes"), {"get_weather": schema})
    for delta in deltas:
        events = parser.feed(delta.text)
    events = parser.finish()

A call whose name was read is passed on as the model wrote it, whatever the name. If its JSON is invalid, or the answer
ends within it, its arguments come as far as they were written and it has no `ToolCallEnd`; a call that has one has
arguments that are a JSON object. What cannot become a call, and calls beyond `MAX_CALLS`, are text.
"""

import json
from collections.abc import Callable, Iterable, Mapping

from zif.parsing.call_object import CallObject
from zif.parsing.events import ParseEvent, ReasoningPiece, TextPiece, ToolCallArguments, ToolCallBegin, ToolCallEnd
from zif.parsing.formats import SHOWN, Format, Reads, State
from zif.parsing.json_values import SPACE, JsonScanner, skip_space
from zif.parsing.markers import Markers
from zif.parsing.parameters import ParameterValue, parameter_types
from zif.parsing.pieces import Pieces, name_in_header, name_in_text

MAX_CALLS = 128
MAX_HELD_CHARACTERS = 2**16
"""An attempt at a call that has not named its tool by then is text."""

MAX_BLANKS = 16
"""Blanks before a marker that are taken as the marker's."""

MAX_COLLECTED = {Reads.NAME: 256, Reads.HEADER: 1024, Reads.KEY: 256}
"""Characters up to the marker that must end a name, a header, a key."""


class Parser:
    """Takes one answer apart.

    `tools` are the names of the request's tools, or their JSON schemas by name, which say what parameters written as
    text are. Without tools no calls are looked for. `starts_in_reasoning` says that the prompt has begun the reasoning.
    """

    def __init__(
        self, form: Format, tools: Iterable[str] | Mapping[str, object] = (), starts_in_reasoning: bool = False
    ) -> None:
        self._format = form
        self._tools: Mapping[str, object] = tools if isinstance(tools, Mapping) else dict.fromkeys(tools)
        self._readers: dict[Reads, Callable[[Parser, str, int], int | None]] = {
            Reads.SPACE: Parser._read_space,
            Reads.PARAMETERS: Parser._read_space,
            Reads.NAME: Parser._read_collected,
            Reads.HEADER: Parser._read_collected,
            Reads.KEY: Parser._read_collected,
            Reads.OBJECT: Parser._read_object,
            Reads.ARGUMENTS: Parser._read_arguments,
            Reads.VALUE: Parser._read_value,
            Reads.REST: Parser._read_rest,
        }
        self._pieces = Pieces()
        self._carry = ""
        self._is_final = False
        self._held: list[str] = []
        self._num_held = 0
        self._num_calls = 0
        self._open_name: str | None = None
        self._num_parameters = 0
        self._value: ParameterValue | None = None
        start = form.start
        if starts_in_reasoning and form.reasoning is not None:
            start = form.reasoning
        elif form.states[start].needs_tools and not self._tools:
            start = form.text
        self._state: State
        self._enter(start, after_marker=starts_in_reasoning)
        self._is_untouched = True

    @property
    def num_held_characters(self) -> int:
        """Count the characters that were fed and wait for a decision."""
        return len(self._carry) + self._num_held

    def feed(self, text: str) -> list[ParseEvent]:
        """Take more of the answer; return what is certain now."""
        assert not self._is_final, "text after finish()"
        text = self._carry + text
        self._carry = text[self._run(text) :]
        return self._pieces.take()

    def finish(self) -> list[ParseEvent]:
        """Return what was held back: the answer has ended. A header that was not finished says nothing."""
        self._is_final = True
        text, self._carry = self._carry, ""
        at = self._run(text)
        assert at == len(text), f"{len(text) - at} characters are left at the end of an answer"
        if self._state.reads is not Reads.HEADER:
            self._pieces.add(TextPiece("".join(self._held)))
        self._drop_held()
        return self._pieces.take()

    def _run(self, text: str) -> int:
        """Read as much of `text` as can be decided; return where that ends."""
        at = 0
        while at < len(text):
            if self._num_held >= MAX_HELD_CHARACTERS:
                self._fail()
            reader = self._readers.get(self._state.reads, Parser._read_shown)
            end = reader(self, text, at)
            if end is None:
                break
            at = end
        return at

    def _enter(self, name: str, after_marker: bool = False) -> None:
        self._state = self._format.states[name]
        self._is_untouched = False
        self._markers: Markers = self._state.markers if self._tools else self._state.markers_without_tools
        self._at_begin = self._state.trim and after_marker
        self._num_collected = 0
        self._collected: list[str] = []
        self._object: CallObject | None = None
        self._scanner: JsonScanner | None = None
        if not self._state.needs_tools and self._state.reads is not Reads.HEADER:
            self._drop_held()
            self._open_name = None

    def _hold(self, text: str) -> None:
        """Keep text of an attempt at a call, which is text after all if the attempt fails."""
        if self._open_name is None and text:
            self._held.append(text)
            self._num_held += len(text)

    def _drop_held(self) -> None:
        self._held, self._num_held = [], 0

    def _stop(self, text: str, at: int) -> int:
        """Return where an attempt must have succeeded, for text that stands at `at`."""
        if self._open_name is not None:
            return len(text)
        return min(len(text), at + MAX_HELD_CHARACTERS - self._num_held)

    def _fail(self, target: str | None = None) -> None:
        """Give up what was read: an open call becomes a broken one, an attempt at one becomes text, then `target`."""
        if self._open_name is not None:
            assert self._format.broken is not None, "a format with calls has a state for broken ones"
            self._enter(self._format.broken)
        else:
            self._pieces.add(TextPiece("".join(self._held)))
            self._enter(target or self._format.text)

    def _take_marker(self, marker: str, at: int, target: str | None = None) -> int:
        """Go where a marker leads; return where the text goes on."""
        end = at + self._markers.length_taken(marker)
        self._hold(marker[: end - at])
        self._enter(target or self._markers.targets[marker], after_marker=True)
        return end

    def _begin_call(self, name: str) -> bool:
        """Begin a call; False for a name that none can have, and beyond the limit of calls."""
        # Names that are not printable would not survive being sent on: lone surrogates cannot be encoded.
        if not 0 < len(name) <= MAX_COLLECTED[Reads.NAME] or not name.isprintable() or " " in name:
            return False
        if self._num_calls >= MAX_CALLS:
            return False
        self._drop_held()
        self._open_name = name
        self._num_parameters = 0
        self._value = None
        self._pieces.add(ToolCallBegin(self._num_calls, name))
        self._num_calls += 1
        return True

    def _add_arguments(self, text: str) -> None:
        self._pieces.add(ToolCallArguments(self._num_calls - 1, text))

    def _end_call(self, whole: bool) -> None:
        if whole:
            self._pieces.add(ToolCallEnd(self._num_calls - 1))
        self._open_name = None

    def _read_shown(self, text: str, at: int) -> int | None:
        if self._at_begin:
            begin = skip_space(text, at, len(text))
            self._at_begin = begin == len(text)
            if begin > at:
                return begin
        found = self._markers.find(text, at, len(text), self._is_final)
        end = found.start
        if self._state.trim and (found.marker is not None or not self._is_final):
            end = max(len(text[at:end].rstrip(SPACE)) + at, end - MAX_BLANKS)
        is_text = self._state.reads is Reads.TEXT
        self._pieces.add(TextPiece(text[at:end]) if is_text else ReasoningPiece(text[at:end]))
        if found.marker is not None:
            after = self._take_marker(found.marker, found.start)
            if self._state.reads not in SHOWN and found.start > end:
                self._held.insert(0, text[end : found.start])
                self._num_held += found.start - end
            return after
        return end if end > at else None

    def _read_space(self, text: str, at: int) -> int | None:
        end = skip_space(text, at, self._stop(text, at))
        if end > at:
            if self._held:
                self._hold(text[at:end])
            return end
        marker = self._markers.match(text, at)
        if marker is not None:
            target = self._markers.targets[marker]
            if self._state.reads is Reads.PARAMETERS and self._format.states[target].reads is not Reads.KEY:
                self._end_parameters()
            return self._take_marker(marker, at)
        if self._markers.may_grow(text, at):
            if not self._is_final:
                return None
            # A marker that the answer's end cut off is no text, unless there is nothing else.
            if not self._held and not self._is_untouched:
                return len(text)
        otherwise = self._state.otherwise
        if otherwise is None or self._format.states[otherwise].reads in SHOWN:
            self._fail(otherwise)
        else:
            self._enter(otherwise)
        return at

    def _end_parameters(self) -> None:
        if self._open_name is not None:
            self._add_arguments("}" if self._num_parameters else "{}")
            self._end_call(whole=True)

    def _read_collected(self, text: str, at: int) -> int | None:
        limit = MAX_COLLECTED[self._state.reads]
        stop = min(self._stop(text, at), at + limit - self._num_collected)
        found = self._markers.find(text, at, stop, self._is_final)
        if found.start > at:
            self._collected.append(text[at : found.start])
            self._num_collected += found.start - at
            self._hold(text[at : found.start])
            return found.start
        if found.marker is not None:
            return self._end_collected("".join(self._collected), found.marker, at)
        if stop == at:
            self._fail()
            return at
        return None

    def _end_collected(self, collected: str, marker: str, at: int) -> int:
        state, target, name = self._state, None, None
        if state.reads is Reads.NAME:
            name = name_in_text(collected, state)
        elif state.reads is Reads.KEY:
            return self._end_key(collected, marker, at)
        fitting = (route for route in state.routes if route.has in collected and self._is_usable(route.state))
        route = next(fitting, None)
        if route is not None:
            target, name = route.state, name_in_header(collected, route)
        if name is not None and not self._begin_call(name):
            self._fail()
            return at
        return self._take_marker(marker, at, target)

    def _is_usable(self, name: str) -> bool:
        return bool(self._tools) or not self._format.states[name].needs_tools

    def _end_key(self, collected: str, marker: str, at: int) -> int:
        key = collected.strip()
        if self._open_name is None or not key:
            self._fail()
            return at
        self._add_arguments(f"{', ' if self._num_parameters else '{'}{json.dumps(key, ensure_ascii=False)}: ")
        self._num_parameters += 1
        self._value = ParameterValue(parameter_types(self._tools.get(self._open_name), key))
        return self._take_marker(marker, at)

    def _read_value(self, text: str, at: int) -> int | None:
        if self._value is None:
            self._fail()
            return at
        if self._at_begin:
            self._at_begin = False
            if text[at] == "\n":
                return at + 1
        # What may belong to the end marker is left out also at the answer's end: the value was cut off.
        found = self._markers.find(text, at, len(text), is_final=False)
        end = found.start
        if self._state.trim and end > at and text[end - 1] == "\n":
            end -= 1
        if end > at:
            self._add_arguments(self._value.add(text[at:end]))
        if found.marker is None and self._is_final:
            return len(text)
        if found.marker is None:
            return end if end > at else None
        self._add_arguments(self._value.end())
        self._value = None
        return self._take_marker(found.marker, found.start)

    def _read_object(self, text: str, at: int) -> int:
        if self._object is None:
            self._object = CallObject(self._tools if self._state.bare else None)
        found = self._object
        end = found.read(text, at, self._stop(text, at))
        self._hold(text[at:end])
        if found.ready and self._open_name is None and not self._begin_call(found.name or ""):
            self._fail()
            return end
        if self._open_name is not None:
            self._add_arguments(found.take_arguments())
        if found.failed or (found.done and self._open_name is None):
            self._fail()
        elif found.done:
            self._end_call(whole=True)
            self._enter(self._state.then or self._format.text)
        return end

    def _read_arguments(self, text: str, at: int) -> int:
        if self._scanner is None:
            begin = skip_space(text, at, self._stop(text, at))
            if begin > at:
                return begin
            if self._open_name is None or text[at] != "{":
                self._fail()
                return at
            self._scanner = JsonScanner()
        scanner = self._scanner
        end = scanner.scan(text, at, len(text))
        self._add_arguments(text[at:end])
        if scanner.failed:
            self._fail()
        elif scanner.done:
            self._end_call(whole=True)
            self._enter(self._state.then or self._format.text)
        return end

    def _read_rest(self, text: str, at: int) -> int | None:
        found = self._markers.find(text, at, len(text), self._is_final)
        if found.start > at:
            self._add_arguments(text[at : found.start])
            return found.start
        if found.marker is None:
            return None
        self._end_call(whole=False)
        return self._take_marker(found.marker, at)
