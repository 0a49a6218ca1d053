"""Bugs planted on purpose: the simulation must notice each of them within 200,000 steps.

Each is a mistake that somebody could make, as one patch of a method. A bug that no check sees would pass for working
code, so this is the test of the checks. The bugs are functions of the test modules beside this one.
"""

from collections.abc import Callable

import pytest

from zif.simulation import Campaign, SimulationFailure, run_scenarios

MAX_STEPS = 200_000

Plant = Callable[[pytest.MonkeyPatch], None]


def bugs_of(names: dict[str, object]) -> list[Plant]:
    """Return the functions among a module's global names, but for those that begin with `_`."""
    return [
        value
        for name, value in names.items()
        if callable(value) and getattr(value, "__module__", "") == names["__name__"] and not name.startswith("_")
    ]


def assert_noticed(monkeypatch: pytest.MonkeyPatch, plant: Plant) -> None:
    """Plant a bug, and fail unless the simulation fails by it."""
    plant(monkeypatch)
    with pytest.raises(SimulationFailure, match="zif simulate --seed") as caught:
        run_scenarios(Campaign(seed=0, num_steps=MAX_STEPS))
    assert not isinstance(caught.value.__cause__, TypeError | AttributeError | NameError), "the patch itself is broken"
