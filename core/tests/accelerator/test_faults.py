"""Which errors mean that a device is lost."""

import pytest

from zif.accelerator.faults import device_faults, loss_of
from zif.errors import DeviceLostError


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Device error: an illegal memory access was encountered\nkernel errors might be", "outside its memory"),
        ("Device error: device-side assert triggered", "assertion failed"),
        ("Device error: unspecified launch failure", "failed on the device"),
        ("Device error: uncorrectable ECC error encountered", "cannot be corrected"),
        ("HSA_STATUS_ERROR_EXCEPTION: an HSAIL operation resulted in a hardware exception", "queue has failed"),
        ("Device is lost", "gone away"),
        ("Device error: unknown error", "does not say why"),
    ],
)
def test_a_lost_device_is_named_with_the_next_step(text, what):
    with pytest.raises(DeviceLostError, match=what) as caught, device_faults("device:3"):
        raise RuntimeError(text)
    message = str(caught.value)
    assert "'device:3'" in message
    assert text.splitlines()[0] in message
    assert "kernel errors might be" not in message
    assert any(step in message for step in ("start the process anew", "reset"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("Device error: out of memory"),
        RuntimeError("unknown error while parsing"),
        ValueError("illegal memory access"),
    ],
)
def test_other_errors_pass(error):
    assert loss_of(error) == ""
    with pytest.raises(type(error), match=r".") as caught, device_faults("device:0"):
        raise error
    assert caught.value is error


def test_a_loss_is_told_once():
    with pytest.raises(DeviceLostError) as caught, device_faults("outer"), device_faults("inner"):
        raise RuntimeError("unspecified launch failure")
    assert "'inner'" in str(caught.value)
