"""How a family of models writes reasoning and tool calls, as data: states, and the markers that lead on from each.

A format is a file `formats/<name>.toml` of at most 60 lines. The package's docstring says how to add one, `Reads` what
a state may read. Loading checks everything that can be checked without an answer, so a parser meets no surprise.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from zif.errors import ConfigError
from zif.parsing.format_checks import check_format
from zif.parsing.format_table import FormatTable
from zif.parsing.markers import Markers

FOLDER = Path(__file__).parent / "formats"
MAX_FILE_BYTES = 2**16


class Reads(StrEnum):
    """What a state reads, and what becomes of it.

    Text, reasoning: shown. Space: blanks, dropped. Header: up to a marker, decides where to go. Name: up to a marker,
    the tool's. Object: a JSON object with the tool's name and its arguments. Arguments: a JSON object that is the
    arguments. Parameters: blanks between parameters that are written one by one. Key, value: one parameter's. Rest:
    what is left of a call that cannot be read.
    """

    TEXT = "text"
    REASONING = "reasoning"
    SPACE = "space"
    HEADER = "header"
    NAME = "name"
    OBJECT = "object"
    ARGUMENTS = "arguments"
    PARAMETERS = "parameters"
    KEY = "key"
    VALUE = "value"
    REST = "rest"


SHOWN = frozenset({Reads.TEXT, Reads.REASONING})
NEUTRAL = SHOWN | {Reads.SPACE, Reads.HEADER}
"""What is read also where there are no tools to call."""

_MARKED = frozenset(Reads) - {Reads.OBJECT, Reads.ARGUMENTS}
_KEEPING = frozenset({Reads.SPACE, Reads.NAME, Reads.PARAMETERS})


@dataclass(frozen=True, slots=True)
class Route:
    """Where a header leads that contains `has`. `name_after`: the tool's name follows this text, without `prefix`."""

    has: str
    state: str
    name_after: str | None
    prefix: str


@dataclass(frozen=True, slots=True)
class State:
    """One state. `markers` are seen where the request has tools, `markers_without_tools` where it has none.

    `otherwise` is where anything but a marker leads (space), `then` where the end of a JSON object leads. `trim` takes
    blanks beside markers as theirs. `prefix` is no part of a name, nor is what follows `suffix`. `bare` marks an object
    without a marker before it, which is a call only if it names a known tool and has nothing that calls have not.
    """

    name: str
    reads: Reads
    markers: Markers
    markers_without_tools: Markers
    otherwise: str | None
    then: str | None
    trim: bool
    bare: bool
    needs_tools: bool
    prefix: str
    suffix: str | None
    routes: tuple[Route, ...]

    @property
    def targets(self) -> Iterator[str]:
        """Give every state that this one can lead to."""
        yield from self.markers.targets.values()
        yield from (route.state for route in self.routes)
        yield from (state for state in (self.otherwise, self.then) if state is not None)


@dataclass(frozen=True, slots=True)
class Written:
    """How answers look: `string.Template` texts with $reasoning, $text, $calls, $name, $arguments, $key and $value.

    `call` is one call, between calls stands `between`, and `calls` is around them all. Where `parameter` is given,
    $arguments stands for all parameters, one after the other.
    """

    text: str
    reasoning: str | None
    call: str | None
    between: str
    calls: str
    parameter: str | None


@dataclass(frozen=True, slots=True)
class Format:
    """A format. Answers begin in state `start`, or in `reasoning` where the prompt has begun it.

    `text` is the state of plain text, to which attempts at calls that fail fall back; `broken` that of calls that fail
    later. `templates` are texts that stand in the chat templates of the family.
    """

    name: str
    start: str
    text: str
    reasoning: str | None
    broken: str | None
    reasoning_prompt: str | None
    needs_special_tokens: bool
    templates: tuple[str, ...]
    states: Mapping[str, State]
    written: Written

    @property
    def has_calls(self) -> bool:
        """Say whether the family writes calls of tools."""
        return self.broken is not None

    def starts_in_reasoning(self, prompt: str) -> bool:
        """Say whether a rendered prompt ends with the begin of reasoning, so that the answer goes on with it."""
        end = self.reasoning_prompt
        return end is not None and prompt[-len(end) - 64 :].rstrip().endswith(end)


def format_names() -> list[str]:
    """Return the names of the formats that come with zif."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


@lru_cache(maxsize=64)
def load_format(name: str) -> Format:
    """Return the format `name`. Raises ConfigError for a name that is unknown, naming those that are known."""
    if name not in format_names():
        raise ConfigError(f"format {name!r} is unknown; known are {', '.join(format_names())}")
    return read_format(FOLDER / f"{name}.toml")


def read_format(path: Path) -> Format:
    """Read and check a format file. Raises ConfigError naming the file, the table and the key that is wrong."""
    try:
        source = path.read_bytes()
        if len(source) > MAX_FILE_BYTES:
            raise ConfigError(f"{path.name} has {len(source)} bytes; a format has at most {MAX_FILE_BYTES}")
        values = tomllib.loads(source.decode("utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path.name} cannot be read as TOML: {error}") from error
    return _format(path.stem, FormatTable(path.name, values))


def _format(name: str, table: FormatTable) -> Format:
    table.text("description")
    tables = table.tables("states")
    readings = {state: _reads(inner) for state, inner in tables.items()}
    needing = {state for state, inner in tables.items() if inner.flag("needs_tools")}
    needing |= {state for state, reads in readings.items() if reads not in NEUTRAL}
    found = Format(
        name=name,
        start=table.text("start"),
        text=table.text("text"),
        reasoning=table.text("reasoning", "") or None,
        broken=table.text("broken", "") or None,
        reasoning_prompt=table.text("reasoning_prompt", "") or None,
        needs_special_tokens=table.flag("needs_special_tokens"),
        templates=table.texts("templates"),
        states={state: _state(state, inner, readings[state], needing) for state, inner in tables.items()},
        written=_written(table.table("written")),
    )
    table.done()
    check_format(found, table.where)
    return found


def _reads(table: FormatTable) -> Reads:
    value = table.text("reads")
    if value not in list(Reads):
        raise ConfigError(f"{table.where}: reads = {value!r} must be one of {', '.join(Reads)}")
    return Reads(value)


def _state(name: str, table: FormatTable, reads: Reads, needing: set[str]) -> State:
    consumed = table.text_by_text("markers") if reads in _MARKED else {}
    kept = table.text_by_text("before") if reads in _KEEPING else {}
    is_object = reads in (Reads.OBJECT, Reads.ARGUMENTS)
    is_name = reads is Reads.NAME
    state = State(
        name=name,
        reads=reads,
        markers=_markers(table.where, consumed, kept),
        markers_without_tools=_markers(table.where, _without(consumed, needing), _without(kept, needing)),
        otherwise=table.text("else", "") or None if reads is Reads.SPACE else None,
        then=table.text("then") if is_object else None,
        trim=table.flag("trim") if reads in SHOWN or reads is Reads.VALUE else False,
        bare=table.flag("bare") if reads is Reads.OBJECT else False,
        needs_tools=name in needing,
        prefix=table.text("prefix", "") if is_name else "",
        suffix=table.text("suffix", "") or None if is_name else None,
        routes=tuple(map(_route, table.list_of_tables("routes"))) if reads is Reads.HEADER else (),
    )
    table.done()
    return state


def _without(markers: Mapping[str, str], needing: set[str]) -> dict[str, str]:
    return {marker: state for marker, state in markers.items() if state not in needing}


def _markers(where: str, consumed: Mapping[str, str], kept: Mapping[str, str]) -> Markers:
    try:
        return Markers(consumed, kept)
    except ValueError as error:
        raise ConfigError(f"{where}: markers: {error}") from error


def _route(table: FormatTable) -> Route:
    route = Route(
        table.text("has"), table.text("state"), table.text("name_after", "") or None, table.text("prefix", "")
    )
    table.done()
    return route


def _written(table: FormatTable) -> Written:
    written = Written(
        text=table.text("text", "$text"),
        reasoning=table.text("reasoning", "") or None,
        call=table.text("call", "") or None,
        between=table.text("between", ""),
        calls=table.text("calls", "$calls"),
        parameter=table.text("parameter", "") or None,
    )
    table.done()
    return written
