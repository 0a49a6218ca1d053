"""What AMD's own library says of a board, for people who read a plan: its name, driver and firmware. Never required.

Nothing depends on it: hardware is found without it, in `zif_amd.hardware`.
"""

import contextlib
import importlib
import io
from typing import Any

_FIRMWARE = ("CP_MEC1", "PM", "PLDM_BUNDLE")


def board_facts(pci_address: str) -> tuple[str, ...]:
    """Describe the board at a PCI address; empty when the library is not installed, or does not know it.

    Makes no context on the device: the library asks the driver.
    """
    try:
        # The package prints when it does not find its library.
        with contextlib.redirect_stdout(io.StringIO()):
            amdsmi = importlib.import_module("amdsmi")
    except (ImportError, OSError, KeyError, AttributeError):
        return ()
    try:
        amdsmi.amdsmi_init()
    except (amdsmi.AmdSmiException, OSError):
        return ()
    try:
        return _facts(amdsmi, pci_address)
    except (amdsmi.AmdSmiException, OSError, KeyError):
        return ()
    finally:
        with contextlib.suppress(amdsmi.AmdSmiException, OSError):
            amdsmi.amdsmi_shut_down()


def _facts(amdsmi: Any, pci_address: str) -> tuple[str, ...]:
    for handle in amdsmi.amdsmi_get_processor_handles():
        if amdsmi.amdsmi_get_gpu_device_bdf(handle).lower() != pci_address:
            continue
        name = amdsmi.amdsmi_get_gpu_asic_info(handle)["market_name"]
        driver = amdsmi.amdsmi_get_gpu_driver_info(handle)["driver_version"]
        listed = amdsmi.amdsmi_get_fw_info(handle)["fw_list"]
        versions = [f"{_block(entry)} {entry['fw_version']}" for entry in listed if _block(entry) in _FIRMWARE]
        firmware = f", firmware: {', '.join(versions)}" if versions else ""
        return (f"amdsmi: {name}, driver {driver}{firmware}",)
    return ()


def _block(entry: Any) -> str:
    """Name a part with firmware without the library's prefix."""
    return str(getattr(entry["fw_name"], "name", entry["fw_name"])).removeprefix("AMDSMI_FW_ID_").removeprefix("FW_ID_")
