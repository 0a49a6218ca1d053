"""How an answer to a chat is constrained and read back, as its tools, its form and the model's family say.

| tools | structured output | the answer |
|---|---|---|
| none, or not to be called | none | free, read by the family's format |
| none, or not to be called | given | text of the form |
| may be called | none | free; calls of strict functions keep their schema |
| may be called | given | text of the form, or calls in the family's way and nothing else |
| must be called | any | calls as JSON; a form says how text looks, and there is none |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from zif.contract import SamplingParams, StructuredOutput
from zif.errors import RequestError
from zif.parsing.events import ParseEvent
from zif.serving.chat.formats import ChatFormat, PlainText
from zif.serving.chat.turn import ChatTurn, Tool, ToolMode
from zif.serving.tools.forced import NamedCall, RequiredCalls, named_call_form, required_calls_form
from zif.serving.tools.form_or_calls import FormOrCalls
from zif.serving.tools.grammar import CallableTools, CallGrammar


class AnswerParser(Protocol):
    """Takes one sample's text apart as it comes."""

    def feed(self, text: str) -> list[ParseEvent]:
        """Take more text; return what is certain now."""
        ...

    def finish(self) -> list[ParseEvent]:
        """Return what was held back; no text follows."""
        ...


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """Sampling options under which an answer has its form, and what makes a parser for each of its samples.

    `in_reasoning` says that the prompt has begun the reasoning. `is_strict` says that the form is there for the sake of
    strict tools alone.
    """

    sampling: SamplingParams
    parser: Callable[[], AnswerParser]
    in_reasoning: bool = False
    is_strict: bool = False


def plan_answer(turn: ChatTurn, form: ChatFormat, grammar: CallGrammar, prompt: str) -> AnswerPlan:
    """Decide on the answer to a turn whose prompt is `prompt`.

    Raises RequestError for tools and forms that this model cannot serve together.
    """
    sampling = turn.sampling
    if turn.tool_choice.forced:
        return _forced(turn)
    tools: Sequence[Tool] = [] if turn.tool_choice.mode is ToolMode.NONE else turn.tools
    if sampling.structured is not None and not tools:
        return AnswerPlan(sampling, PlainText)
    if form.needs_special_tokens:
        sampling = replace(sampling, skip_special_tokens=False)
    callable_tools = CallableTools([tool["function"] for tool in tools], turn.strict_tools, turn.tool_choice.parallel)
    if sampling.structured is not None:
        either = replace(sampling.structured, or_grammar=grammar.only_calls(callable_tools, prompt))
        sampling = replace(sampling, structured=either)
        return AnswerPlan(sampling, lambda: FormOrCalls(form.parser(tools, False)))
    in_reasoning = form.starts_in_reasoning(prompt)
    is_strict = bool(tools) and bool(turn.strict_tools) and grammar.has_calls
    if is_strict:
        sampling = _with_strict_calls(sampling, grammar.among_text(callable_tools, in_reasoning))
    return AnswerPlan(sampling, lambda: form.parser(tools, in_reasoning), in_reasoning, is_strict)


def _with_strict_calls(sampling: SamplingParams, grammar: str) -> SamplingParams:
    if sampling.ignore_eos:
        raise RequestError("ignore_eos=True excludes strict tools: their calls say where to end; leave one of them out")
    try:
        return replace(sampling, structured=StructuredOutput(grammar=grammar))
    except RequestError as error:
        raise RequestError(f"tools: strict calls need too long a grammar: {error}; make fewer tools strict") from error


def _forced(turn: ChatTurn) -> AnswerPlan:
    functions, choice = [tool["function"] for tool in turn.tools], turn.tool_choice
    if choice.mode is ToolMode.NAMED:
        name = str(choice.name)
        sampling = replace(turn.sampling, structured=named_call_form(functions, name))
        return AnswerPlan(sampling, lambda: NamedCall(name))
    return AnswerPlan(replace(turn.sampling, structured=required_calls_form(functions, choice.parallel)), RequiredCalls)
