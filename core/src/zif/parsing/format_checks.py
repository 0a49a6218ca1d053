"""What must hold of a format as a whole, beyond the kinds of its keys."""

from collections.abc import Callable, Iterable, Iterator
from string import Template
from typing import TYPE_CHECKING

from zif.errors import ConfigError

if TYPE_CHECKING:
    from zif.parsing.formats import Format, State

_CALL_READS = frozenset({"name", "object", "arguments", "parameters", "key", "value", "rest"})
_BLANKS = " \t\n\r"


def check_format(form: "Format", where: str) -> None:
    """Raise ConfigError for a format that a parser could not follow to the end of every answer."""
    problem = next(_problems(form), None)
    if problem is not None:
        raise ConfigError(f"{where}: {problem}")


def _problems(form: "Format") -> Iterator[str]:
    for key in ("start", "text", "reasoning", "broken"):
        state = getattr(form, key)
        if state is not None and state not in form.states:
            yield f"{key} = {state!r} is none of the states {', '.join(form.states)}"
    yield from _wrong_roles(form)
    for state in form.states.values():
        yield from (f"states.{state.name}: {problem}" for problem in _state_problems(form, state))
    yield from _unreachable(form)
    yield from _circles(form)
    yield from _wrong_templates(form)


def _wrong_roles(form: "Format") -> Iterator[str]:
    for key, reads in (("text", "text"), ("reasoning", "reasoning"), ("broken", "rest")):
        state = getattr(form, key)
        if state is not None and form.states[state].reads != reads:
            found = form.states[state].reads.value
            yield f"{key} = {state!r} names a state that reads {found!r}; it must read {reads!r}"
    if form.states[form.start].reads not in ("text", "reasoning", "space", "object"):
        yield f"start = {form.start!r} must name a state that reads text, reasoning, space or a bare object"
    if form.reasoning is None and form.reasoning_prompt is not None:
        yield f"reasoning_prompt = {form.reasoning_prompt!r} needs reasoning, the state that it leads to"
    if form.broken is None and any(state.reads in _CALL_READS for state in form.states.values()):
        yield "broken is missing: name the state, reading 'rest', for calls that cannot be read"


def _state_problems(form: "Format", state: "State") -> Iterator[str]:
    for target in state.targets:
        if target not in form.states:
            yield f"leads to {target!r}, which is none of the states {', '.join(form.states)}"
    if state.reads == "space" and any(marker[0] in _BLANKS for marker in state.markers.targets):
        yield "a marker begins with a blank, and blanks are dropped before markers are looked for"
    if state.reads in ("header", "name", "key", "value") and not state.markers:
        yield f"markers is empty, and what reads {state.reads.value!r} ends with a marker"


def _unreachable(form: "Format") -> Iterator[str]:
    begins = [state for state in (form.start, form.text, form.reasoning, form.broken) if state is not None]
    reached = _reached(begins, lambda name: form.states[name].targets)
    for name in form.states:
        if name not in reached:
            yield f"states.{name} is reached from no state"
    neutral = [name for name in begins if not form.states[name].needs_tools]
    for name in _reached(neutral, lambda name: _targets_without_tools(form, form.states[name])):
        if form.states[name].needs_tools:
            yield f"states.{name} needs tools and is reached without them"


def _reached(begins: Iterable[str], targets: Callable[[str], Iterable[str]]) -> set[str]:
    """Return the names that `targets` leads to, from `begins` on."""
    seen: set[str] = set()
    waiting = list(begins)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += targets(name)
    return seen


def _targets_without_tools(form: "Format", state: "State") -> Iterator[str]:
    yield from state.markers_without_tools.targets.values()
    yield from (route.state for route in state.routes if not form.states[route.state].needs_tools)
    if state.otherwise is not None:
        yield state.otherwise


def _circles(form: "Format") -> Iterator[str]:
    """Find ways from a state back to itself on which no text is taken: a parser would go round for ever."""
    for start, state in form.states.items():
        if start in _reached(_idle_targets(state), lambda name: _idle_targets(form.states[name])):
            yield f"states.{start} leads back to itself without taking any text"


def _idle_targets(state: "State") -> Iterator[str]:
    if state.otherwise is not None:
        yield state.otherwise
    yield from (target for marker, target in state.markers.targets.items() if not state.markers.length_taken(marker))


def _wrong_templates(form: "Format") -> Iterator[str]:
    written = form.written
    wanted = {
        "text": {"text"},
        "reasoning": {"reasoning"},
        "call": {"name", "arguments"},
        "calls": {"calls"},
        "parameter": {"key", "value"},
    }
    for key, names in wanted.items():
        template = getattr(written, key)
        if template is None:
            continue
        if not Template(template).is_valid() or set(Template(template).get_identifiers()) != names:
            yield f"written: {key} = {template!r} must have {' and '.join('$' + name for name in sorted(names))}"
    if (written.call is None) is not (form.broken is None):
        yield "written: call must be given for a family that writes calls, and for no other"
    if (written.reasoning is None) is not (form.reasoning is None):
        yield "written: reasoning must be given for a family that reasons, and for no other"
