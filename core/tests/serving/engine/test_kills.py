"""Whoever is killed, nobody and nothing is left. `kills.py` does a hundred."""

import importlib.util
import random
from pathlib import Path

import pytest


def load_kills():
    spec = importlib.util.spec_from_file_location("kills", Path(__file__).with_name("kills.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kills = load_kills()


class Planned(random.Random):
    """Chance that was decided before."""

    def __init__(self, after_s, victim):
        super().__init__(0)
        self._planned = (after_s, victim)

    def uniform(self, a, b):
        return self._planned[0]

    def choice(self, seq):
        return self._planned[1] if "host" in seq else seq[0]


def check(kill):
    assert kill.left == (), kill
    assert kill.reaction_s <= kills.LIMIT_S, kill


@pytest.mark.parametrize(("victim", "after_s"), [("host", 0.25), ("engine", 0.6)])
def test_a_kill_leaves_nothing(victim, after_s):
    check(kills.kill_once(Planned(after_s, victim)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kills_at_random_moments_leave_nothing(seed):
    check(kills.kill_once(random.Random(seed)))
