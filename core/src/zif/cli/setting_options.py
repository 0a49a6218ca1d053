"""The engine's settings as options of a command, generated from their declarations.

Used by every command that builds an engine or a plan.
"""

import argparse
from collections.abc import Iterable
from dataclasses import Field
from pathlib import Path
from typing import Any

from zif.cli.terminal import warn
from zif.settings import (
    AUTO,
    EngineSettings,
    OptionKind,
    ResolvedSettings,
    format_settings,
    option_of,
    resolve_settings,
    setting_fields,
)

_METAVARS = {OptionKind.TEXT: "TEXT", OptionKind.INTEGER: "N", OptionKind.BYTES: "BYTES"}


def add_setting_options(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, one option per setting, `--config` and `--print-config`."""
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="folder of the model")
    group = parser.add_argument_group("engine settings", "also as ZIF_NAME in the environment, or in a --config file")
    group.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings")
    group.add_argument("--print-config", action="store_true", help="print every setting with its origin, and exit")
    add_declared_options(group, [declared for declared in setting_fields() if declared.name != "model"])


def add_declared_options(group: Any, declared_settings: "Iterable[Field[Any]]") -> None:
    """Add one option for each declared setting."""
    for declared in declared_settings:
        _add_option(group, declared)


def settings_of(arguments: argparse.Namespace) -> EngineSettings:
    """Return the settings that a command line asks for; warnings go to stderr."""
    resolved = resolved_settings_of(arguments)
    for warning in resolved.warnings:
        warn(warning)
    return resolved.settings


def print_config_if_asked(arguments: argparse.Namespace) -> bool:
    """Print the resolved settings when the command line asks for that; say whether it did."""
    if arguments.print_config:
        print(format_settings(resolved_settings_of(arguments)))
    return bool(arguments.print_config)


def resolved_settings_of(arguments: argparse.Namespace) -> ResolvedSettings:
    """Return the settings that a command line asks for, with where each came from."""
    names = {declared.name for declared in setting_fields()}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return resolve_settings(given, toml_path=arguments.config)


def _add_option(group: Any, declared: "Field[Any]") -> None:
    """Add one setting. Values stay text here: settings.py is the one place that reads and judges them."""
    option = option_of(declared)
    flag = "--" + declared.name.replace("_", "-")
    default = AUTO if declared.default is None else str(declared.default).lower()
    help_text = f"{option.help} (default: {default})".replace("%", "%%")
    if option.kind is OptionKind.SWITCH:
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, default=argparse.SUPPRESS, help=help_text)
        return
    metavar = "{" + ",".join(option.choices) + "}" if option.choices else _METAVARS[option.kind]
    group.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=help_text)
