"""The real block manager against the reference model, on arenas of every kind of layer group and mixtures of them."""

import pytest
from hypothesis.stateful import run_state_machine_as_test

from kv.block_manager_machine import ARENAS, SETTINGS, BlockManagerMachine

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ARENAS)
def test_the_manager_answers_as_the_model_says(family):
    machine = type(f"Machine_{family}", (BlockManagerMachine,), {"arenas": ARENAS[family]})
    run_state_machine_as_test(machine, settings=SETTINGS)
