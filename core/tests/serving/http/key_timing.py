"""Does the time that a server takes to refuse a key tell how near the key was?

    python core/tests/serving/http/key_timing.py [--calls 200000] [--keys 8] [--seed 0]

Keys that are right but for their last letter, and keys with no letter right, are refused in random order. Welch's t of
the two sets of times says whether their means differ; beyond `MAX_T` they do. The same is done with a comparison that
ends at the first wrong letter, which must be found out: else the method sees nothing here, and its word counts for
nothing. Exit code 0: no difference for the server, and one for the other.

Source: Reparaz, Balasch and Verbauwhede, "Dude, is my code constant time?", 2017, with its crop of slow outliers.
"""

import argparse
import gc
import random
import string
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, variance

from zif.serving.http.auth import parse_keys
from zif.serving.http.errors import ApiError
from zif.serving.http.exchange import AuthScope, Headers

MAX_T = 4.5
KEY_CHARS = 48
NUM_GIVEN = 64
"""Different keys of each set."""

KEPT_SHARE = 0.9
"""Of the times, the fastest: the rest are interruptions."""

_LETTERS = string.ascii_letters + string.digits

Refusal = Callable[[Headers], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """Mean times of the two sets, in ns, and Welch's t of their difference."""

    near_ns: float
    far_ns: float
    t: float

    def __str__(self) -> str:
        ratio = self.near_ns / self.far_ns
        return f"near {self.near_ns:.0f} ns, far {self.far_ns:.0f} ns, ratio {ratio:.4f}, t {self.t:+.1f}"


def near_and_far(keys: Sequence[str], chance: random.Random) -> tuple[list[bytearray], list[bytearray]]:
    """Return keys that are right but for the last letter, and keys that have no letter right."""
    near, far = [], []
    for count in range(NUM_GIVEN):
        key = keys[count % len(keys)]
        near.append(bytearray((key[:-1] + _other(key[-1], chance)).encode()))
        far.append(bytearray("".join(_other(letter, chance) for letter in key).encode()))
    return near, far


def compare(
    refuse: Refusal, near: list[bytearray], far: list[bytearray], num_calls: int, chance: random.Random
) -> Finding:
    """Time refusals of both sets in random order."""
    times: tuple[list[int], list[int]] = ([], [])
    sets = (near, far)
    gc.disable()
    try:
        for _ in range(num_calls):
            which = chance.getrandbits(1)
            # A copy, as a parser makes one: where a key lies in memory makes more difference than what is in it.
            headers = Headers(
                [(b"host", b"localhost"), (b"x-api-key", bytes(sets[which][chance.randrange(NUM_GIVEN)]))]
            )
            began_ns = time.perf_counter_ns()
            refuse(headers)
            times[which].append(time.perf_counter_ns() - began_ns)
    finally:
        gc.enable()
    limit_ns = sorted(times[0] + times[1])[int(num_calls * KEPT_SHARE)]
    near_ns, far_ns = ([taken for taken in one if taken <= limit_ns] for one in times)
    error = sqrt(variance(near_ns) / len(near_ns) + variance(far_ns) / len(far_ns))
    return Finding(fmean(near_ns), fmean(far_ns), (fmean(near_ns) - fmean(far_ns)) / error)


def server_refusal(keys: Sequence[str]) -> Refusal:
    """Return how the server refuses."""
    ring = parse_keys(keys)

    def refuse(headers: Headers) -> None:
        try:
            ring.authorize(headers, AuthScope.INFERENCE)
        except ApiError:
            return
        raise AssertionError("a wrong key was let in")

    return refuse


def leaking_refusal(keys: Sequence[str]) -> Refusal:
    """Return a comparison that ends at the first wrong letter."""

    def refuse(headers: Headers) -> None:
        given = headers.get("x-api-key") or ""
        for key in keys:
            for mine, yours in zip(key, given, strict=True):
                if mine != yours:
                    break

    return refuse


def _other(letter: str, chance: random.Random) -> str:
    return chance.choice(_LETTERS.replace(letter, ""))


def main() -> int:
    """Compare both ways and print what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=200_000)
    parser.add_argument("--keys", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    keys = ["".join(chance.choices(_LETTERS, k=KEY_CHARS)) for _ in range(options.keys)]
    near, far = near_and_far(keys, chance)
    server = compare(server_refusal(keys), near, far, options.calls, chance)
    leaking = compare(leaking_refusal(keys), near, far, options.calls, chance)
    print(f"{'holds' if abs(server.t) <= MAX_T else 'FAILS'}  the server tells nothing: {server}")
    print(f"{'holds' if leaking.t > MAX_T else 'FAILS'}  a comparison that leaks is found out: {leaking}")
    return 0 if abs(server.t) <= MAX_T < leaking.t else 1


if __name__ == "__main__":
    sys.exit(main())
