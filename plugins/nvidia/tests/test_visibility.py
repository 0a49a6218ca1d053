"""What CUDA_VISIBLE_DEVICES leaves, as CUDA reads it."""

import pytest

from zif_nvidia.hardware import read_hardware
from zif_nvidia.settings import visible_devices
from zif_nvidia.visibility import visible_gpus

CARDS = ("H100", "H100 too", "RTX 4090")
UUIDS = ("GPU-11111111-aaaa", "GPU-12222222-bbbb", "GPU-89898989-ffff")


@pytest.fixture
def visible(nvml):
    return lambda written, cards=CARDS: visible_gpus(read_hardware(lambda: nvml(*cards)).gpus, written)


@pytest.mark.parametrize(
    ("written", "left"),
    [
        (None, [0, 1, 2]),
        ("0", [0]),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("1,7,2", [1]),
        ("0,-1,1", [0]),
        ("1,x,0", [1]),
        ("2x", [2]),
        ("0,GPU-8989", [0]),
        ("GPU-8989", [2]),
        ("GPU-12222222-bbbb,GPU-111", [1, 0]),
        ("GPU-89898989-ffff,0", [2]),
    ],
)
def test_gpus_are_named_by_index_or_by_the_beginning_of_their_id(visible, written, left):
    found = visible(written)
    assert [gpu.uuid for gpu in found.gpus] == [UUIDS[index] for index in left]
    assert found.problem == ""


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("", "set and empty"),
        ("  ", "set and empty"),
        ("-1", "names no GPU"),
        ("7", "'7' names none"),
        ("NoDevFiles", "names no GPU"),
        ("0,0", "comes twice"),
        ("GPU-1", "'GPU-1' names none"),
        ("GPU-", "names no GPU"),
        ("GPU-111,GPU-1111", "comes twice"),
        ("MIG-aaaa", "names no GPU"),
    ],
)
def test_what_hides_every_gpu_is_a_reason(visible, written, said):
    found = visible(written)
    assert found.gpus == ()
    assert said in found.problem


def test_what_ended_the_list_is_told(visible):
    assert "'7' names none, and ends the list" in visible("1,7,2").steps[0]


@pytest.mark.parametrize(
    ("written", "left"),
    [
        (None, ["MIG-aaaa", UUIDS[0]]),
        ("0", ["MIG-aaaa"]),
        ("MIG-bbbb", ["MIG-bbbb"]),
        ("1,0", [UUIDS[0], "MIG-aaaa"]),
    ],
)
def test_one_instance_of_divided_gpus_is_seen(visible, written, left):
    divided = ("A100", {"parts": ("slice", "slice too")})
    assert [gpu.uuid for gpu in visible(written, (divided, "H100")).gpus] == left


def test_several_divided_gpus_show_one_instance(visible):
    cards = (("A100", {"parts": ("slice",)}), ("A100", {"uuid": "GPU-2", "parts": ("slice too",)}))
    found = visible(None, cards)
    assert [gpu.uuid for gpu in found.gpus] == ["MIG-aaaa"]
    assert "one instance" in found.steps[0]


def test_a_divided_gpu_without_instances_is_a_problem_of_its_own(visible):
    (gpu,) = visible(None, (("A100", {"parts": ()}),)).gpus
    assert "no instance was made" in gpu.problem


def test_without_gpus_there_is_nothing_to_say(visible):
    assert visible("0", ()).problem == ""


def test_settings():
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == ""
    assert visible_devices({}) is None
