"""What AMD's own library adds for people, and that its absence or refusal costs nothing."""

import sys
import types

import pytest

from zif_amd.smi import board_facts

ADDRESS = "0000:01:00.0"


class _Error(Exception):
    """The library's own."""


@pytest.fixture
def library(monkeypatch):
    """A stand-in that knows one board; `fails` names its functions that raise, `calls` those that were called."""
    module = types.ModuleType("amdsmi")
    module.AmdSmiException = _Error
    module.fails, module.calls = set(), []
    firmware = {
        "fw_list": [{"fw_name": "AMDSMI_FW_ID_PM", "fw_version": "85.119"}, {"fw_name": "X", "fw_version": "1"}]
    }
    answers = {
        "amdsmi_init": None,
        "amdsmi_shut_down": None,
        "amdsmi_get_processor_handles": ["board"],
        "amdsmi_get_gpu_device_bdf": ADDRESS,
        "amdsmi_get_gpu_asic_info": {"market_name": "AMD Instinct MI300X"},
        "amdsmi_get_gpu_driver_info": {"driver_version": "6.14.14"},
        "amdsmi_get_fw_info": firmware,
    }

    def answer(name):
        def function(*arguments):
            module.calls.append(name)
            if name in module.fails:
                raise _Error(name)
            return answers[name]

        return function

    for name in answers:
        setattr(module, name, answer(name))
    monkeypatch.setitem(sys.modules, "amdsmi", module)
    return module


def test_a_board_is_described(library):
    expected = "amdsmi: AMD Instinct MI300X, driver 6.14.14, firmware: PM 85.119"
    assert board_facts(ADDRESS) == (expected,)
    assert library.calls[-1] == "amdsmi_shut_down"


def test_another_board_is_not_known(library):
    assert board_facts("0000:99:00.0") == ()


@pytest.mark.parametrize("name", ["amdsmi_init", "amdsmi_get_gpu_asic_info", "amdsmi_shut_down"])
def test_what_the_library_refuses_costs_nothing(library, name):
    library.fails.add(name)
    assert board_facts(ADDRESS) == () or name == "amdsmi_shut_down"


def test_without_the_library_there_is_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    assert board_facts(ADDRESS) == ()


def test_a_library_that_cannot_load_prints_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "amdsmi.py").write_text("print('Unable to find libamd_smi.so'); {}['libamd_smi.so']")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "amdsmi", raising=False)
    assert board_facts(ADDRESS) == ()
    assert capsys.readouterr().out == ""
