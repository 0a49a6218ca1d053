"""The action `new-plugin` of `zif conform`. Registered by `zif_conformance.command`."""

import argparse
from pathlib import Path
from typing import Any


def register(actions: Any) -> None:
    """Add the action."""
    parser = actions.add_parser("new-plugin", help="write a working plugin to begin from", allow_abbrev=False)
    parser.add_argument("name", metavar="NAME", help="the platform's name: lower-case letters, digits, underscores")
    parser.add_argument("--into", metavar="DIR", type=Path, help="folder of the package (default: zif-NAME here)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the package and say what comes next."""
    from zif_conformance.template.writing import PluginNames, write_plugin

    names = PluginNames.checked(arguments.name)
    folder = arguments.into if arguments.into is not None else Path(names.distribution)
    files = write_plugin(names, folder)
    print(f"wrote {len(files)} files to {folder}\nnext: pip install --editable {folder}")
    print(f"then: zif conform --platform {names.platform} --profile core")
    return 0
