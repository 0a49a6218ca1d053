"""`zif conform`: the conformance suite, which is a distribution of its own.

Installed distributions bring commands through the entry-point group `zif.commands`; core knows none of them but this
one's name, so that it can say how to get it.
"""

import argparse
import importlib.metadata
from typing import Any

from zif.errors import ConfigError

_GROUP, _NAME = "zif.commands", "conform"


def register(commands: Any) -> None:
    """Add the installed suite's command to the parser, or one that says why there is none."""
    problem = "it is not installed: pip install zif-conformance"
    for entry_point in importlib.metadata.entry_points(group=_GROUP, name=_NAME):
        try:
            entry_point.load().register(commands)
        except Exception as error:  # a broken suite must not take the other commands with it
            problem = f"it cannot be loaded: {type(error).__name__}: {error}; reinstall zif-conformance"
        else:
            return
    # With this prefix nothing is an option, so that whatever follows gets the answer below.
    parser = commands.add_parser(
        _NAME, help="prove a platform (needs zif-conformance)", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("rest", nargs="*")
    parser.set_defaults(run=run, problem=problem)


def run(arguments: argparse.Namespace) -> int:
    """Say what to install."""
    raise ConfigError(f"`zif conform` comes with the conformance suite, but {arguments.problem}")
