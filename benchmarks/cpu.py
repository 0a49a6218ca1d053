"""Compare zif with every peer on this machine's processors: one command, the same traffic, interleaved rounds.

The physics: a step of one request reads every weight once, so memory bandwidth bounds it; a step of many tokens
multiplies, so products per second do. Both are measured in the same rounds and printed beside the engines. Each peer
lives in an environment of its own (`cpu/environments.toml` has the versions), and each run of an engine is a process
of its own: it starts, answers one token cold, warms up, answers the workloads once, and ends. Rounds repeat that with
the engines in turn; medians of rounds are what the table shows. Greedy, fixed output lengths, random weights.

    python benchmarks/cpu.py                         everything: results/cpu.json, results/cpu.md, results/cpu.svg
    python benchmarks/cpu.py --only-setup            make environments and weights: 18 GB, some twenty minutes
    python benchmarks/cpu.py --quick --rounds 1      shortened traffic, into results/cpu-quick.json: does it run?
    python benchmarks/cpu.py --engines zif-bf16,openvino-fp16 --workloads one,many
    python benchmarks/cpu.py --isa avx512_vnni       as a processor without AMX: results/cpu-avx512_vnni.json
    python benchmarks/cpu.py --table                 print the report of what was measured
    python benchmarks/cpu.py --readme README.md      write the README's section; with --check, only compare

It can be stopped and started again: what was measured is kept, what failed is tried again, and `--fresh` begins anew.
What an engine cannot run is in the report with the engine's own words.
"""

import argparse
import shlex
import sys
from pathlib import Path

from cpu import cap
from cpu.engines import ENGINES, engine, num_cores
from cpu.environments import CACHE, PeerError
from cpu.plot import svg
from cpu.report import is_current, readme_section, report, write_section
from cpu.results import Results, read
from cpu.rounds import Plan, run, set_up
from cpu.workloads import MAIN, workloads

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    options = _parser().parse_args()
    path = options.json or RESULTS / f"{_stem(options)}.json"
    if options.table:
        print(report(read(path)), end="")
        return 0
    if options.readme:
        return _readme(options.readme, path, options.check)
    try:
        plan = _plan(options)
    except PeerError as error:
        print(error, file=sys.stderr)
        return 2
    if options.only_setup:
        return 1 if set_up(plan) else 0
    results = Results.begin(path, options.quick, options.fresh, options.isa)
    try:
        run(plan, results)
    finally:
        if path.exists():
            written = read(path)  # as others read it: what is compared later has the order of the file
            path.with_suffix(".md").write_text(report(written))
            path.with_suffix(".svg").write_text(svg(written))
    print(report(results.data), end="")
    return 0


def _stem(options: argparse.Namespace) -> str:
    """Return the name of the files of results: what is capped or shortened has files of its own."""
    return "-".join(["cpu", *([options.isa] if options.isa else []), *(["quick"] if options.quick else [])])


def _readme(readme: Path, path: Path, only_compare: bool) -> int:
    """Write the README's section from results, or say whether it is what they give."""
    folder = path.parent.resolve().relative_to(readme.parent.resolve()).as_posix()
    section = readme_section(read(path), f"{folder}/{path.stem}.svg", f"{folder}/{path.stem}.md")
    if not only_compare:
        write_section(readme, section)
        return 0
    is_same = is_current(readme, section)
    print(f"{readme} {'shows' if is_same else 'does not show'} what is in {path}")
    return 0 if is_same else 1


def _plan(options: argparse.Namespace) -> Plan:
    known = workloads(options.quick)
    names = options.workloads.split(",") if options.workloads else list(known)
    for name in names:
        if name not in known:
            raise PeerError(f"there is no workload {name!r}; there are {', '.join(known)}")
    default = [entry.name for entry in ENGINES if entry.by_default]
    engines = [engine(name) for name in (options.engines.split(",") if options.engines else default)]
    folder = options.environments.expanduser().resolve()
    return Plan(
        engines=engines,
        workloads={name: known[name] for name in names},
        num_rounds=options.rounds,
        folder=folder,
        threads=options.threads,
        idle_s=options.idle_s,
        timeout_s=options.timeout_s,
        num_other_rounds=options.other_rounds,
        cap=cap.prepare(folder, options.isa) if options.isa else None,
        command=shlex.join(["python", "benchmarks/cpu.py", *sys.argv[1:]]),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", help=f"of {', '.join(entry.name for entry in ENGINES)}")
    parser.add_argument("--workloads", help=f"of {', '.join(workloads())}")
    parser.add_argument("--rounds", type=int, default=3, help="how often each engine runs in turn")
    parser.add_argument("--other-rounds", type=int, default=1, help=f"of workloads other than {', '.join(MAIN)}")
    parser.add_argument("--quick", action="store_true", help="an eighth of the output")
    parser.add_argument("--isa", choices=cap.SWITCHES, help="compute as a processor with no more than this")
    parser.add_argument("--threads", type=int, default=num_cores(), help="threads of every engine; default: cores")
    parser.add_argument("--idle-s", type=float, default=10.0, help="how long zif is watched idle; 0: not at all")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="longest time of one workload")
    parser.add_argument("--environments", type=Path, default=CACHE, help="folder of environments and weights")
    parser.add_argument("--json", type=Path, help="file of results")
    parser.add_argument("--fresh", action="store_true", help="forget what the file of results has")
    parser.add_argument("--only-setup", action="store_true", help="make environments and weights, measure nothing")
    parser.add_argument("--table", action="store_true", help="print the report of the results and measure nothing")
    parser.add_argument("--readme", type=Path, help="write the section of this file and measure nothing")
    parser.add_argument("--check", action="store_true", help="with --readme: compare and write nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
