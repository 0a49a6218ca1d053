"""Which GPUs the runtime's variables leave, in which order, and what is said when they leave none."""

import pytest

from zif_amd.hardware import read_hardware
from zif_amd.settings import AmdSettings, VisibleDevices, let_collectives_fail, read_settings
from zif_amd.visibility import visible_gpus


@pytest.fixture
def gpus(machine):
    """Four GPUs that tell themselves apart by their ids."""
    machine.add_driver()
    for number in range(4):
        machine.add("MI300X", unique_id=0xA0 + number)
    return read_hardware(machine.root).gpus


def _left(gpus, **variables):
    visible = visible_gpus(gpus, read_settings(variables).filters)
    return [gpu.node - 1 for gpu in visible.gpus], visible.problem


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"HIP_VISIBLE_DEVICES": "2"}, [2]),
        ({"HIP_VISIBLE_DEVICES": "3, 1"}, [3, 1]),
        ({"ROCR_VISIBLE_DEVICES": "3,2,1"}, [3, 2, 1]),
        ({"ROCR_VISIBLE_DEVICES": "3,2,1", "HIP_VISIBLE_DEVICES": "2,0"}, [1, 3]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": ""}, [0, 1, 2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "2"}, [2]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-00000000000000a2,0"}, [2, 0]),
        ({"HIP_VISIBLE_DEVICES": "1,7,2"}, [1]),
        ({"HIP_VISIBLE_DEVICES": "1,1,2"}, [1]),
        ({"HIP_VISIBLE_DEVICES": "1,-1"}, [1]),
        ({"HIP_VISIBLE_DEVICES": "1,two"}, [1]),
    ],
)
def test_variables_choose_and_order(gpus, variables, expected):
    assert _left(gpus, **variables) == (expected, "")


@pytest.mark.parametrize("text", ["", " ", "-1"])
@pytest.mark.parametrize("variable", ["HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
def test_a_variable_may_hide_every_gpu(gpus, variable, text):
    left, problem = _left(gpus, **{variable: text})
    assert left == []
    assert f"{variable}={text.strip()} hides every GPU; unset it, or name those to use: 0 to 3" in problem


@pytest.mark.parametrize("text", ["4", "one", "GPU-", "GPU-0", "GPU-ff"])
def test_names_of_no_gpu_are_told_with_those_that_there_are(gpus, text):
    left, problem = _left(gpus, HIP_VISIBLE_DEVICES=text)
    assert left == []
    assert f"HIP_VISIBLE_DEVICES={text} names no GPU; there are 4" in problem


def test_the_name_that_ends_a_list_is_a_step(gpus):
    (step,) = visible_gpus(gpus, read_settings({"HIP_VISIBLE_DEVICES": "1,7"}).filters).steps
    assert step.startswith("HIP_VISIBLE_DEVICES=1,7: 1 of 4 GPUs; '7' is no further one")


def test_what_the_process_cannot_open_is_not_counted(machine, gpus):
    machine.deny("dev/dri/renderD128")
    assert _left(read_hardware(machine.root).gpus, HIP_VISIBLE_DEVICES="0") == ([1], "")


def test_when_it_can_open_none_that_is_the_problem(machine, gpus):
    for minor in range(128, 132):
        machine.deny(f"dev/dri/renderD{minor}")
    left, problem = _left(read_hardware(machine.root).gpus)
    assert left == []
    assert "no access to /dev/dri/renderD128" in problem


def test_settings():
    assert read_settings({}) == AmdSettings()
    environ = {"HIP_VISIBLE_DEVICES": "0,1", "HSA_OVERRIDE_GFX_VERSION": "9.0.10"}
    assert read_settings(environ) == AmdSettings((VisibleDevices("HIP_VISIBLE_DEVICES", ("0", "1")),), 90010)


@pytest.mark.parametrize("text", ["11", "gfx1100", "11.0.0.0"])
def test_an_override_of_another_form_is_a_problem(text):
    assert f"HSA_OVERRIDE_GFX_VERSION={text!r}" in read_settings({"HSA_OVERRIDE_GFX_VERSION": text}).problem


def test_collectives_fail_softly_unless_the_user_says_otherwise():
    environ = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}
    let_collectives_fail(environ)
    assert environ == {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3", "TORCH_NCCL_BLOCKING_WAIT": "1"}
