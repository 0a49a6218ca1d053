"""Entry point of `zif`: find the command, run it, turn errors into one line and an exit code.

Exit codes: 0 done, 1 a `ZifError`, 2 wrong usage or settings, 130 interrupted, 141 the reader of our output is gone.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields

from zif import __version__
from zif.cli import batch, bench, chat, conform, explain, generate, platforms, serve, simulate
from zif.contract.sampling import SamplingParams
from zif.errors import ConfigError, ZifError
from zif.serving.http.settings import serve_setting_fields
from zif.settings import foreign_name_advice, setting_fields

_FLAG = re.compile(r"--[a-z][a-z0-9_-]*")
_EXIT_ERROR, _EXIT_USAGE, _EXIT_INTERRUPTED, _EXIT_BROKEN_PIPE = 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Unexpected errors leave with their traceback."""
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except ZifError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_USAGE if isinstance(error, ConfigError) else _EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give it something that accepts the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="zif", description="LLM inference on any hardware that has a plugin.")
    parser.add_argument("--version", action="version", version=f"zif {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (generate, chat, serve, batch, bench, platforms, explain, simulate, conform):
        command.register(commands)
    return parser


def _run(argv: Sequence[str]) -> int:
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(_with_dashes(argv))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_advise(unknown)}")
    code: int = arguments.run(arguments)
    return code


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """Accept `--max_num_seqs` for `--max-num-seqs`, as settings are spelled everywhere else."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [_dashed(argument) for argument in argv[:end]] + list(argv[end:])


def _dashed(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if _FLAG.fullmatch(name) else argument


def _advise(unknown: Sequence[str]) -> str:
    """Say which option was meant. Raises `ConfigError` on an option of another engine, with zif's answer to it."""
    declared = (*serve_setting_fields(), *setting_fields(), *fields(SamplingParams))
    known = ["--" + option.name.replace("_", "-") for option in declared]
    for flag in [argument.partition("=")[0] for argument in unknown if argument.startswith("--")]:
        if flag == "--model":
            return " (the model's folder comes right after the command, without an option's name)"
        if advice := foreign_name_advice(flag.removeprefix("--").replace("-", "_")):
            raise ConfigError(f"{flag}: {advice}")
        if nearest := difflib.get_close_matches(flag, known, n=1):
            return f" (did you mean {nearest[0]}?)"
    return ""
