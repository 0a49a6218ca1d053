"""`zif conform self-test`: try the suite on its bank of mutants and variants. 0: all killed, no alarm."""

import argparse
import time
from typing import Any

from zif.errors import ConfigError


def register(actions: Any) -> None:
    """Add the action to those of `zif conform`."""
    parser = actions.add_parser("self-test", help="test the suite on seeded faults", allow_abbrev=False)
    parser.add_argument("--workers", metavar="N", type=int, default=1, help="processes beside each other (default: 1)")
    parser.add_argument("--mutant", metavar="NAME", action="append", help="try this mutant or variant only")
    parser.add_argument(
        "--level", metavar="L3", action="append", help="try the mutants and variants of this level only"
    )
    parser.add_argument(
        "--quick", action="store_true", help="mutants only, each with the test that is known to kill it"
    )
    parser.add_argument("--freeze", action="store_true", help="write down which test killed which mutant")
    parser.set_defaults(run=run_self_test)


def run_self_test(arguments: argparse.Namespace) -> int:
    """Run it and print both rates."""
    from zif_conformance.mutants.bank import all_mutants, all_variants, by_name
    from zif_conformance.mutants.selftest import KILLERS, SelfTest, killers_text, read_killers

    if arguments.workers < 1:
        raise ConfigError(f"--workers {arguments.workers!r} must be at least 1")
    mutants = _chosen(all_mutants(), arguments)
    variants = () if arguments.quick else _chosen(all_variants(), arguments)
    if not mutants and not variants:
        raise ConfigError(f"no mutant or variant has name {arguments.mutant!r} and level {arguments.level!r}")
    start = time.monotonic()
    test = SelfTest(mutants, variants, _print_trial, arguments.workers, arguments.quick)
    test.run()
    broken = sum(map(len, test.broken.values()))
    if broken:
        print(f"{broken} tests fail on the platform as it is and were left out")
    for level in sorted({subject.level for subject in (*mutants, *variants)}):
        of_level = [[one for one in many if one.level == level] for many in (mutants, variants)]
        _print_rates(level, of_level[0], of_level[1], test)
    _print_rates("all", mutants, variants, test)
    for title, subjects in (("survivors", test.survivors), ("false alarms", test.false_alarms)):
        if subjects:
            print(f"{title}: {', '.join(subject.name for subject in subjects)}")
    print(f"{time.monotonic() - start:.0f} s")
    if arguments.freeze:
        known = {name: killer for name, killer in read_killers().items() if name in by_name(all_mutants(), ())}
        text = killers_text([test.trials[mutant.name] for mutant in mutants], known)
        KILLERS.write_text(text, encoding="utf-8")
    return 1 if test.survivors or test.false_alarms or broken else 0


def _chosen(subjects: Any, arguments: argparse.Namespace) -> tuple[Any, ...]:
    return tuple(
        subject
        for subject in subjects
        if (not arguments.mutant or subject.name in arguments.mutant)
        and (not arguments.level or subject.level in arguments.level)
    )


def _print_rates(level: str, mutants: Any, variants: Any, test: Any) -> None:
    killed = sum(test.trials[mutant.name].noticed for mutant in mutants)
    alarms = sum(test.trials[variant.name].noticed for variant in variants)
    print(
        f"{level}: killed {killed} of {len(mutants)} mutants ({_percent(killed, len(mutants))}), "
        f"false alarms {alarms} of {len(variants)} variants ({_percent(alarms, len(variants))})"
    )


def _print_trial(subject: Any, trial: Any) -> None:
    from zif_conformance.mutants.bank import Mutant

    if isinstance(subject, Mutant):
        how = "killed" if trial.noticed else "SURVIVED"
    elif subject is None:
        how = f"{len(trial.failed)} failed" if trial.noticed else "passed"
    else:
        how = "FALSE ALARM" if trial.noticed else "passed"
    by = trial.crash or ", ".join(test.rpartition("::")[2] for test in trial.failed[:3])
    print(f"{how:11} {trial.name}: {by or f'{trial.num_tests} tests passed'}", flush=True)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "none tried"
