"""Calls that may be made: grammars of answers that call tools in the model's own words, among text or in its place.

What a family's calls look like comes from its format: `[written]` says how a call is written, the states say which
markers begin one. A grammar lets every text pass that the parser takes for text, and holds what it takes for a call.
Calls that must be made are in `forced`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zif.errors import RequestError
from zif.parsing.formats import Format, Reads, State
from zif.serving.tools.arguments import ArgumentRules
from zif.serving.tools.forced import calls_schema
from zif.serving.tools.lark import ANY_TEXT, UNBRACED_TEXT, LarkRules
from zif.structured.notation import WHITESPACE

_CALL_NUMBER = "/[0-9]{1,3}/"

_CHANNELS = '("analysis" | "commentary" | "final")'
"""Of the messages of gpt-oss: https://cookbook.openai.com/articles/openai-harmony."""


@dataclass(frozen=True, slots=True)
class CallableTools:
    """What may be called: functions in OpenAI's form, and the names of those whose arguments must keep their schema."""

    functions: Sequence[Mapping[str, Any]]
    strict: frozenset[str]
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class _Writing:
    """How calls are written: `before` each name, after which its arguments and `after` stand; around all of them."""

    opening: str
    before: str
    middle: str
    after: str
    between: str
    closing: str


class CallGrammar:
    """Grammars of one model. `token_id` finds its tokens by their text; `eos_ids` end an answer."""

    def __init__(self, form: Format, token_id: Callable[[str], int | None], eos_ids: frozenset[int]) -> None:
        self._form = form
        self._token_id = token_id
        self._eos_ids = eos_ids

    @property
    def has_calls(self) -> bool:
        """Say whether the family writes calls at all."""
        return self._form.has_calls

    def only_calls(self, tools: CallableTools, prompt: str) -> str:
        """Return the grammar of an answer to `prompt` that is calls and nothing else.

        Raises RequestError for a family that has no calls.
        """
        if not self._form.has_calls:
            raise RequestError(
                f"tools: this model's chat template has no calls (its format is {self._form.name!r}), so tools beside a"
                " structured output cannot be called; leave one of them out, or set tool_choice to 'none' or 'required'"
            )
        rules, writing = LarkRules(self._token_id), self._writing()
        literal, head = rules.literal, writing.opening + writing.before
        # A prompt may end with what begins every message of the model.
        shared = range(len(head), 0, -1) if self._start.reads is Reads.SPACE else ()
        begun = next((size for size in shared if prompt.endswith(head[:size])), 0)
        after = self._without_end(writing.after)
        call = self._add_call(rules, tools, writing.middle, after)
        is_single = not tools.parallel or after != writing.after
        more = "" if is_single else f"({literal(writing.between + writing.before)} {call})*"
        marked = rules.add("marked", f"{literal(head[begun:])} {call} {more} {literal(writing.closing)}")
        rules.add("start", f"{marked} | {self._bare(rules, tools, writing)}" if self._start.bare else marked)
        return rules.text

    def among_text(self, tools: CallableTools, in_reasoning: bool) -> str:
        """Return the grammar of an answer that is text, reasoning, and calls that keep what `tools` asks for.

        `in_reasoning` says that the prompt has begun the reasoning. Raises RequestError for a schema that calls of this
        family cannot be held to.
        """
        form = self._form
        rules = LarkRules(self._token_id, UNBRACED_TEXT if self._start.bare else ANY_TEXT)
        targets = {marker: form.states[name] for marker, name in form.states[form.text].markers.targets.items()}
        writing = self._writing()
        if any(state.reads is Reads.HEADER for state in targets.values()):
            return self._messages(rules, tools, writing, in_reasoning)
        head, following = writing.opening + writing.before, rules.literal(writing.between + writing.before)
        call = self._add_call(rules, tools, writing.middle, writing.after)
        rules.add("calls", f"{call} ({following} {call})*")
        segments = []
        for marker, state in targets.items():
            begun = rules.up_to(marker)
            if state.reads is Reads.REASONING:
                segments.append(f"{begun} {self._reasoning_end(rules)}")
                continue
            rest = rules.literal(head.partition(marker)[2])
            segments.append(f"{begun} {rest} calls {rules.literal(writing.closing)}")
        rules.add("segment", " | ".join(segments))
        if in_reasoning:
            rules.add("start", f"TEXT | {self._reasoning_end(rules)} segment* TEXT")
        elif self._start.bare:
            rules.add("start", f"({rules.literal(writing.before)} calls)? segment* TEXT")
        else:
            rules.add("start", "segment* TEXT")
        return rules.text

    def _bare(self, rules: LarkRules, tools: CallableTools, writing: _Writing) -> str:
        """Return calls without a marker. They are objects as those of a form, for nothing tells them apart at first."""
        schema = {**calls_schema(tools.functions, tools.strict), "x-guidance": {"whitespace_pattern": WHITESPACE}}
        rules.add("bare", f"%json {json.dumps(schema)}")
        return f"bare ({rules.literal(writing.between)} bare)*" if tools.parallel else "bare"

    @property
    def _start(self) -> State:
        return self._form.states[self._form.start]

    def _writing(self) -> _Writing:
        written = self._form.written
        assert written.call is not None, "a format with calls says what a call looks like"
        opening, closing = written.calls.split("$calls")
        before, middle, after = re.split(r"\$name|\$arguments", written.call)
        return _Writing(opening, before, middle, after, written.between, closing)

    def _add_call(self, rules: LarkRules, tools: CallableTools, middle: str, after: str) -> str:
        """Add the rule of one call from its name to its end; return its name."""
        arguments = ArgumentRules(self._form, rules)
        to_arguments = self._middle(rules, middle)
        for index, function in enumerate(tools.functions):
            of_function = arguments.of(function, function["name"] in tools.strict)
            rules.add(f"call{index}", f"{rules.literal(function['name'])} {to_arguments} {of_function}")
        names = " | ".join(f"call{index}" for index in range(len(tools.functions)))
        return rules.add("call", f"({names}) {rules.literal(after)}")

    def _middle(self, rules: LarkRules, middle: str) -> str:
        """Return what stands between name and arguments. Some families number their calls there."""
        suffixes = (state.suffix for state in self._form.states.values() if state.suffix)
        suffix = next(suffixes, None)
        if suffix is None or not middle.startswith(suffix):
            return rules.literal(middle)
        rest = middle.removeprefix(suffix).lstrip("0123456789")
        return f"{rules.literal(suffix)} {_CALL_NUMBER} {rules.literal(rest)}"

    def _without_end(self, after: str) -> str:
        """Return what follows a call without the token that ends the answer, which comes by itself."""
        found = re.search(r"<[^<>\s]+>$", after)
        is_end = found is not None and self._token_id(found.group()) in self._eos_ids
        return after[: found.start()] if found is not None and is_end else after

    def _reasoning_end(self, rules: LarkRules) -> str:
        form = self._form
        assert form.reasoning is not None, "reasoning has begun"
        markers = form.states[form.reasoning].markers.targets
        return rules.up_to(next(marker for marker, target in markers.items() if target == form.text))

    def _messages(self, rules: LarkRules, tools: CallableTools, writing: _Writing, in_reasoning: bool) -> str:
        """Return the grammar of messages on channels, of which those to a recipient are calls."""
        literal, up_to = rules.literal, rules.up_to
        author, _, recipient = writing.before.removeprefix("<|start|>").partition("<|channel|>")
        call = self._add_call(rules, tools, writing.middle, "")
        rules.add("channel", f"{_CHANNELS} {literal('<|message|>')} | {literal(recipient)} {call}")
        begun = f"{up_to('<|start|>')} {literal(author + '<|channel|>')} channel"
        rules.add("segment", f"{up_to('<|end|>')} | {begun} | {up_to('<|channel|>')} channel")
        rules.add("start", f"{'' if in_reasoning else literal('<|channel|>') + ' channel'} segment* TEXT")
        return rules.text
