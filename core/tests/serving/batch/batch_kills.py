"""Kill `zif batch` or its engine at random moments until its file is done, and see that each request has one answer.

    python core/tests/serving/batch/batch_kills.py [--rounds 10] [--requests 600] [--seed 0]

A round works through one file on the null platform. The command is killed with SIGKILL, told to end, or interrupted, or
its engine is killed, some time after its start or after some answers; half of the time the last line is torn
besides. Then the same command runs again. In the end every line is whole, every request has exactly the answer that it
has without kills, and the order is that of the requests where that was asked for.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from zif.serving.batch.run import MAX_ATTEMPTS

MODEL = Path(__file__).resolve().parents[4] / "examples/embedded_model/checkpoint"
VICTIMS = ("command", "command", "engine", "terminated", "interrupted")
STOPPED = (130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
LIMIT_S = 120.0
_SIGNALS = {"command": signal.SIGKILL, "terminated": signal.SIGTERM, "interrupted": signal.SIGINT}
_ENGINE = b"zif.serving.engine.process"


@dataclass(slots=True)
class Round:
    """What happened on the way to a whole file, and what is wrong with it."""

    num_starts: int = 0
    kills: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def work_through(chance: random.Random, folder: Path, num_requests: int, max_kills: int = 8) -> Round:
    """Answer a file in as many runs as it takes, and report."""
    requests, output = folder / "requests.jsonl", folder / "answers.jsonl"
    ordered = chance.random() < 0.5
    write_requests(requests, num_requests)
    result = Round()
    while True:
        result.num_starts += 1
        with _started(requests, output, ordered) as command:
            code = _harass(command, output, chance, result, max_kills)
        if code == 0:
            break
        # An interpreter that starts hears no signal yet; an engine that ends in its first start is not started again.
        if code not in STOPPED and not (code == 1 and result.kills["engine"]):
            result.problems.append(f"the command ended with {code}")
            return result
        if chance.random() < 0.5:
            _tear(output, chance)
            result.kills["torn"] += 1
    _check(output, answers_without_kills(folder, requests), ordered, result)
    return result


def write_requests(path: Path, num_requests: int) -> None:
    """Write requests of the three APIs, with one in ten that fails, and a line that is none."""
    with path.open("w") as file:
        for k in range(num_requests):
            text = [{"role": "user", "content": f"Return {k}"}]
            url, body = [
                ("/v1/completions", {"prompt": f"Return {k}", "max_tokens": 12 if k % 5 else "many"}),
                ("/v1/chat/completions", {"messages": text, "max_tokens": 12}),
                ("/v1/messages", {"model": "checkpoint", "messages": text, "max_tokens": 12}),
            ][k % 3]
            asked = {"custom_id": f"r{k}", "method": "POST", "url": url, "body": body | {"temperature": 0}}
            file.write(json.dumps(asked) + "\n")
        file.write("no request\n")


def answers_without_kills(folder: Path, requests: Path) -> dict[str | None, object]:
    """Return what each request is answered with in one run, in the order of the requests."""
    output = folder / "undisturbed.jsonl"
    with _started(requests, output, ordered=True) as command:
        assert command.wait(LIMIT_S) == 0
    return {answer["custom_id"]: content_of(answer) for answer in map(json.loads, output.read_text().splitlines())}


def content_of(value: object) -> object:
    """Return an answer without what differs from time to time: ids, times, and what was found computed."""
    if isinstance(value, dict):
        passing = ("request_id", "usage", "created", "created_at", "completed_at")
        kept = {key: content_of(part) for key, part in value.items() if key not in passing}
        return {key: part for key, part in kept.items() if key != "id" or str(part).startswith("batch_req_")}
    return [content_of(part) for part in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _started(requests: Path, output: Path, ordered: bool):
    small = ["--platform", "null", "--max-model-len", "256", "--kv-bytes", "4MiB", "--max-num-seqs", "4"]
    command = [sys.executable, "-m", "zif.cli", "batch", str(MODEL), *small, "--input", str(requests)]
    command += ["--output", str(output), *(["--ordered"] if ordered else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _harass(command: subprocess.Popen, output: Path, chance: random.Random, result: Round, max_kills: int) -> int:
    """Kill the command or its engine, as chance has it, until the command ends; return its exit code."""
    deadline_s = time.monotonic() + LIMIT_S
    victims, num_engines = list(VICTIMS), 0
    while sum(result.kills.values()) < max_kills:
        if chance.random() < 0.3:
            wait_s, num_bytes = chance.uniform(0.0, 1.5), float("inf")
        else:
            wait_s, num_bytes = LIMIT_S, _size(output) + chance.uniform(1, 40_000)
        until_s = min(time.monotonic() + wait_s, deadline_s)
        while command.poll() is None and time.monotonic() < until_s and _size(output) < num_bytes:
            time.sleep(0.001)
        victim = chance.choice(victims)
        if command.poll() is not None:
            return command.returncode
        if victim != "engine":
            command.send_signal(_SIGNALS[victim])
            result.kills[victim] += 1
            break
        if (engine := _engine_of(command.pid)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)
                result.kills[victim] += 1
                num_engines += 1
            # A request that is there at three ends of the engine would be held to be their cause.
            if num_engines == MAX_ATTEMPTS - 1:
                victims = list(_SIGNALS)
    return command.wait(max(deadline_s - time.monotonic(), 1.0))


def _tear(output: Path, chance: random.Random) -> None:
    """Cut the last line short, as a write that was not finished leaves it."""
    content = output.read_bytes() if output.exists() else b""
    last = content[:-1].rfind(b"\n") + 1
    if last < len(content):
        os.truncate(output, chance.randrange(last, len(content)))


def _check(output: Path, expected: dict[str | None, object], ordered: bool, result: Round) -> None:
    lines = output.read_bytes().split(b"\n")
    if lines.pop():
        result.problems.append("the last line has no end")
    answers = [json.loads(line) for line in lines]
    ids = [answer["custom_id"] for answer in answers]
    if Counter(ids) != Counter(list(expected)):
        result.problems.append(f"answered more than once, or never: {Counter(ids) - Counter(list(expected))}")
    if ordered and ids != list(expected):
        result.problems.append("the order is not that of the requests")
    wrong = [a["custom_id"] for a in answers if content_of(a) != expected.get(a["custom_id"])]
    if wrong:
        result.problems.append(f"{len(wrong)} answers differ, such as that to {wrong[0]!r}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _engine_of(pid: int) -> int | None:
    """Return the engine's process among the children of `pid` (proc(5))."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError):
            parent = int(Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and _ENGINE in Path(f"/proc/{name}/cmdline").read_bytes():
                return int(name)
    return None


def main() -> int:
    """Run the rounds that were asked for and print what came of them. 0 when all went well."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rounds = []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory(prefix="zbk") as folder:
            chance = random.Random(arguments.seed + number)
            rounds.append(work_through(chance, Path(folder), arguments.requests))
        if rounds[-1].problems:
            print(f"seed {arguments.seed + number}: {'; '.join(rounds[-1].problems)}", flush=True)
    num_good = sum(not done.problems for done in rounds)
    kills = dict(sum((done.kills for done in rounds), Counter()))
    print(f"{num_good} of {len(rounds)} files are whole, after {sum(r.num_starts for r in rounds)} starts; {kills}")
    return 0 if num_good == len(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
