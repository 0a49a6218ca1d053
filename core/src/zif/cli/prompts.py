"""Where the prompts of `zif generate` come from: options, files, standard input."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from zif.errors import ConfigError

Prompt = str | dict[str, Any]

_KEYS = ("prompt", "prompt_token_ids")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add `--prompt` and `--prompts-file`."""
    group = parser.add_argument_group("prompts", "without either, standard input is one prompt")
    group.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="one or more prompts; repeatable")
    group.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="one prompt per line; .jsonl: one object with 'prompt' or 'prompt_token_ids' per line; -: standard input",
    )


def read_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """Return all prompts that the command line names. Raises `ConfigError` when there are none or a line is wrong."""
    prompts: list[Prompt] = list(arguments.prompt or ())
    if arguments.prompts_file:
        prompts += _read_file(arguments.prompts_file)
    elif not prompts and not sys.stdin.isatty():
        prompts += [text for text in [sys.stdin.read().removesuffix("\n")] if text]
    if not prompts:
        raise ConfigError("there is no prompt; give --prompt TEXT, --prompts-file FILE, or text on standard input")
    return prompts


def _read_file(name: str) -> list[Prompt]:
    if name == "-":
        return list(_text_lines(sys.stdin))
    try:
        with Path(name).open(encoding="utf-8") as lines:
            return list(_json_lines(name, lines) if name.endswith(".jsonl") else _text_lines(lines))
    except OSError as error:
        raise ConfigError(f"cannot read the prompts file {name!r}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompts file {name!r} is no UTF-8 text: {error}; convert it") from error


def _text_lines(lines: Iterable[str]) -> Iterator[Prompt]:
    return (line.rstrip("\n") for line in lines if line.strip())


def _json_lines(name: str, lines: Iterable[str]) -> Iterator[Prompt]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _json_prompt(f"{name}, line {number}", line)


def _json_prompt(place: str, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place} is no valid JSON: {error}") from error
    prompt = entry if isinstance(entry, str) else _known_entry(entry)
    if prompt is None:
        raise ConfigError(f"{place}: expected an object with either 'prompt' or 'prompt_token_ids', got {entry!r:.80}")
    return prompt


def _known_entry(entry: object) -> dict[str, Any] | None:
    """Return what the engine knows of an entry, with exactly one prompt; other keys are the user's own."""
    given = [key for key in _KEYS if isinstance(entry, dict) and key in entry]
    if not isinstance(entry, dict) or len(given) != 1:
        return None
    salt = {"cache_salt": entry["cache_salt"]} if isinstance(entry.get("cache_salt"), str) else {}
    value = entry[given[0]]
    if given[0] == "prompt":
        return {"prompt": value, **salt} if isinstance(value, str) else None
    ids = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    return {"prompt_token_ids": value, **salt} if ids else None
