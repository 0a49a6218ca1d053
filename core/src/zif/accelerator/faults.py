"""Errors that mean that a device, or this process's context on it, is lost: told apart from all others by their text.

After such an error every further call on the device fails, in this process at least. So it is no fault of a request,
and nothing may be tried again.
"""

import contextlib
from collections.abc import Iterator

from zif.errors import DeviceLostError

_RESTART = "start the process anew"

# What runtimes say, in lower case -> what it means, and the next step. Texts come from the drivers' lists of errors;
# they are more stable than the numbers, which differ between vendors, and torch keeps them in its messages.
_LOST: tuple[tuple[str, str, str], ...] = (
    ("illegal memory access", "a kernel read or wrote outside its memory", _RESTART),
    ("illegal address", "a kernel read or wrote outside its memory", _RESTART),
    ("memory access fault", "a kernel read or wrote outside its memory", _RESTART),
    ("misaligned address", "a kernel read or wrote at a wrong alignment", _RESTART),
    ("invalid address space", "a kernel read or wrote in a wrong address space", _RESTART),
    ("invalid program counter", "a kernel ran off its code", _RESTART),
    ("illegal instruction", "a kernel met an instruction that the device does not have", _RESTART),
    ("hardware stack error", "a kernel ruined its stack", _RESTART),
    ("device-side assert", "an assertion failed in a kernel", _RESTART),
    ("unspecified launch failure", "a kernel failed on the device", _RESTART),
    ("launch timed out", "a kernel ran longer than the system allows", _RESTART),
    ("uncorrectable ecc", "the device's memory has an error that cannot be corrected", "reset or replace the device"),
    ("ecc error", "the device's memory has an error that cannot be corrected", "reset or replace the device"),
    ("context is destroyed", "this process's context on the device is gone", _RESTART),
    ("context was destroyed", "this process's context on the device is gone", _RESTART),
    ("device is lost", "the device has gone away", "look at the system's log, then reset the device"),
    ("device lost", "the device has gone away", "look at the system's log, then reset the device"),
    ("fallen off the bus", "the device has gone away", "look at the system's log, then reset the device"),
    ("hsa_status_error", "the device's queue has failed", _RESTART),
    (
        "error: unknown error",
        "the driver failed and does not say why",
        "look at the system's log, then reset the device",
    ),
)


def loss_of(error: BaseException) -> str:
    """Say what happened to the device and the next step; "" when the error does not mean that it is lost."""
    if not isinstance(error, RuntimeError):
        return ""
    text = str(error).lower()
    return next((f"{what}; {step}" for said, what, step in _LOST if said in text), "")


@contextlib.contextmanager
def device_faults(array_device: str) -> Iterator[None]:
    """Turn errors after which the device cannot be used into `DeviceLostError`; let all others pass."""
    try:
        yield
    except RuntimeError as error:
        if not (loss := loss_of(error)):
            raise
        first_line = next(iter(str(error).splitlines()), "")
        raise DeviceLostError(f"device {array_device!r} is lost: {loss} (the driver says: {first_line})") from error
