"""The sampling options of a request as options of a command. Used by `generate` and `chat`."""

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zif.contract.sampling import SamplingParams
from zif.contract.structured import StructuredOutput
from zif.errors import ConfigError, RequestError


@dataclass(frozen=True, slots=True)
class _Sampling:
    """One option: the field of `SamplingParams` that it sets, how to read it, and its help."""

    field: str
    read: Callable[[str], object]
    help: str
    flag: str = ""


_OPTIONS = (
    _Sampling("n", int, "samples per prompt"),
    _Sampling("temperature", float, "0: always the most likely token; higher: more variety"),
    _Sampling("top_p", float, "sample from the most likely tokens that hold this much probability"),
    _Sampling("top_k", int, "sample from this many tokens; 0: all"),
    _Sampling("min_p", float, "leave out tokens less likely than this share of the most likely one"),
    _Sampling("presence_penalty", float, "lower tokens that the output already has"),
    _Sampling("frequency_penalty", float, "lower tokens by how often the output has them"),
    _Sampling("repetition_penalty", float, "divide the logits of tokens that prompt or output have"),
    _Sampling("max_tokens", int, "most tokens to generate"),
    _Sampling("min_tokens", int, "tokens before the end may come"),
    _Sampling("logprobs", int, "report the log-probabilities of this many tokens at each position"),
    _Sampling("seed", int, "seed of each request itself, independent of the other requests", "--request-seed"),
)


def add_sampling_options(
    parser: argparse.ArgumentParser, max_tokens: int, without: Collection[str] = frozenset()
) -> None:
    """Add the sampling options, but those in `without`; `max_tokens` is the command's own default."""
    defaults = SamplingParams(max_tokens=max_tokens)
    group = parser.add_argument_group("sampling")
    for option in (option for option in _OPTIONS if option.field not in without):
        flag = option.flag or "--" + option.field.replace("_", "-")
        text = f"{option.help} (default: {getattr(defaults, option.field)})"
        metavar = "N" if option.read is int else "X"
        group.add_argument(flag, dest=f"sampling_{option.field}", type=option.read, metavar=metavar, help=text)
    group.add_argument(
        "--stop", dest="sampling_stop", action="append", metavar="TEXT", help="end before TEXT; repeatable"
    )
    group.add_argument(
        "--ignore-eos", dest="sampling_ignore_eos", action="store_true", default=None, help="go on after the end token"
    )
    _add_form_options(parser)
    parser.set_defaults(default_max_tokens=max_tokens)


def _add_form_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what form the answer must have; at most one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json-schema", dest="form_json", metavar="FILE", help="answer JSON that this schema allows")
    group.add_argument("--json", dest="form_json_object", action="store_true", help="answer a JSON object")
    group.add_argument("--regex", dest="form_regex", metavar="REGEX", help="answer a text that matches as a whole")
    group.add_argument("--choice", dest="form_choice", action="append", metavar="TEXT", help="answer TEXT; repeatable")
    group.add_argument("--grammar", dest="form_grammar", metavar="FILE", help="answer what this Lark grammar allows")


def sampling_of(arguments: argparse.Namespace) -> SamplingParams:
    """Return the sampling options that a command line asks for. Raises `ConfigError` when one is out of range."""
    prefix = "sampling_"
    given: dict[str, Any] = {"max_tokens": arguments.default_max_tokens}
    for name, value in vars(arguments).items():
        if name.startswith(prefix) and value is not None:
            given[name.removeprefix(prefix)] = value
    try:
        return SamplingParams(**given, structured=_form_of(arguments))
    except RequestError as error:
        raise ConfigError(str(error)) from error


def _form_of(arguments: argparse.Namespace) -> StructuredOutput | None:
    """Return the form that a command line asks for, None without one. Raises `RequestError` when it is no good."""
    prefix = "form_"
    given = {name.removeprefix(prefix): value for name, value in vars(arguments).items() if name.startswith(prefix)}
    given = {name: value for name, value in given.items() if value}
    for name in ("json", "grammar"):
        if name in given:
            given[name] = _read(given[name])
    return StructuredOutput(**given) if given else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path!r} cannot be read ({error}); give a file of UTF-8 text") from error
