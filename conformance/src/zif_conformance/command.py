"""`zif conform`: run the suite on a platform, verify and compare bundles, list tests, draw the support matrix.

Core's command line finds this module through the entry-point group `zif.commands`. Imports nothing heavy: each action
brings what it needs. Exit codes: 0 conformant, or all selected tests good; 1 not; others as `zif` has them.
"""

import argparse
import importlib.util
from importlib import import_module
from pathlib import Path
from typing import Any

from zif.errors import ConfigError

_MORE_ACTIONS = ("zif_conformance.template.command", "zif_conformance.mutants.command")
"""Modules that bring actions of their own (`new-plugin`, `self-test`), each with a function `register`."""


def register(commands: Any) -> None:
    """Add the command to the parser of `zif`."""
    parser = commands.add_parser(
        "conform", help="prove a platform with the conformance suite", allow_abbrev=False, description=__doc__
    )
    parser.add_argument("--platform", metavar="NAME", help="platform under test, as `zif platforms` names it")
    parser.add_argument("--profile", metavar="NAME", help="core (default), serving, distributed, or quantized-SCHEME")
    parser.add_argument("--level", metavar="L0,L3", help="run these levels only; gives no verdict")
    parser.add_argument("--bundle", metavar="DIR", type=Path, help="write the bundle into this folder")
    parser.add_argument(
        "--workers", metavar="N", type=_positive, default=1, help="processes beside each other (default: 1)"
    )
    parser.add_argument(
        "--hardware", action="store_true", help="fail where the platform has no device, instead of simulating one"
    )
    parser.set_defaults(run=run_suite)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    _add_verify(actions)
    _add_compare(actions)
    _add_list(actions)
    _add_matrix(actions)
    for module in _MORE_ACTIONS:
        if _exists(module):
            import_module(module).register(actions)


def run_suite(arguments: argparse.Namespace) -> int:
    """Run the suite and print what came of it."""
    from zif_conformance.bundle.matrix import headline
    from zif_conformance.conduct import Conductor
    from zif_conformance.profiles import parse_levels, profile
    from zif_conformance.simulation import simulate_missing_hardware
    from zif_conformance.supervisor import RunOptions

    if arguments.platform is None:
        raise ConfigError("--platform is missing; name one of: zif platforms")
    if arguments.level is not None and arguments.profile is not None:
        raise ConfigError("--level does not go with --profile, which is a fixed list; leave one of them out")
    chosen = profile(arguments.profile or "core") if arguments.level is None else None
    levels = chosen.levels if chosen else tuple(sorted(parse_levels(arguments.level)))
    if not arguments.hardware:
        simulate_missing_hardware(arguments.platform)
    options = RunOptions(arguments.platform, levels, arguments.workers, chosen.selection if chosen else None)
    result = Conductor(options, chosen, arguments.bundle).run()
    for error in result["errors"]:
        print(f"error of the run: {error}")
    counts = ", ".join(f"{count} {word}" for word, count in result["counts"].items() if count) or "no tests"
    print(f"{headline(result)}\n{counts}, {result['duration_s']:.0f} s")
    if arguments.bundle is not None:
        print(f"bundle: {arguments.bundle} (open {arguments.bundle / 'report.html'})")
    return 0 if _good(result) else 1


def run_verify(arguments: argparse.Namespace) -> int:
    """Re-check bundles off line."""
    from zif_conformance.bundle.matrix import headline
    from zif_conformance.bundle.verify import read_result, verify_bundle

    problems = verify_bundle(arguments.folder)
    for problem in problems:
        print(f"{arguments.folder}: {problem}")
    if not problems:
        print(f"{arguments.folder}: whole; {headline(read_result(arguments.folder))}")
    return 1 if problems else 0


def run_compare(arguments: argparse.Namespace) -> int:
    """Print what changed between two bundles."""
    from zif_conformance.bundle.compare import compare_results
    from zif_conformance.bundle.verify import read_result

    comparison = compare_results(read_result(arguments.before), read_result(arguments.after))
    kinds = ("regressions", "improvements", "other")
    for kind in kinds:
        for line in getattr(comparison, kind):
            print(f"{kind.removesuffix('s')}: {line}")
    print(", ".join(f"{len(getattr(comparison, kind))} {kind}" for kind in kinds))
    return 1 if comparison.regressions else 0


def run_list(arguments: argparse.Namespace) -> int:
    """Print the tests of a profile, or those that the suite has."""
    from zif_conformance.profiles import profile

    chosen = profile(arguments.profile)
    print(f"{chosen.name} {chosen.version}: levels {', '.join(chosen.levels)}, {len(chosen.must_pass)} tests")
    for test_id in chosen.must_pass:
        print(test_id)
    return 0


def run_matrix(arguments: argparse.Namespace) -> int:
    """Print the support matrix of bundles, or write it between the markers of a file."""
    from zif_conformance.bundle.support import keep_summaries, kept_matrix, support_matrix, write_between_markers

    text = support_matrix(arguments.folders)
    if arguments.keep is not None:
        keep_summaries(arguments.folders, arguments.keep)
        text = kept_matrix(arguments.keep)
    if arguments.readme is None:
        print(text)
    else:
        write_between_markers(arguments.readme, text)
    return 0


def _add_verify(actions: Any) -> None:
    parser = actions.add_parser("verify", help="re-check a bundle off line", allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.set_defaults(run=run_verify)


def _add_compare(actions: Any) -> None:
    parser = actions.add_parser("compare", help="show what changed between two bundles", allow_abbrev=False)
    parser.add_argument("before", metavar="A", type=Path)
    parser.add_argument("after", metavar="B", type=Path)
    parser.set_defaults(run=run_compare)


def _add_list(actions: Any) -> None:
    parser = actions.add_parser("list", help="list the must-pass tests of a profile", allow_abbrev=False)
    parser.add_argument("profile", metavar="PROFILE", nargs="?", default="core", help="(default: core)")
    parser.set_defaults(run=run_list)


def _add_matrix(actions: Any) -> None:
    parser = actions.add_parser("matrix", help="draw the support matrix from bundles", allow_abbrev=False)
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path)
    parser.add_argument("--readme", metavar="FILE", type=Path, help="write between the markers of this Markdown file")
    parser.add_argument(
        "--keep", metavar="DIR", type=Path, help="keep a summary of each bundle there, and draw all that are kept"
    )
    parser.set_defaults(run=run_matrix)


def _good(result: dict[str, Any]) -> bool:
    if result["profile"] is not None:
        return bool(result["verdict"] == "conformant")
    bad = ("failed", "crashed", "not run")
    return not result["errors"] and not any(result["counts"][word] for word in bad)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value
