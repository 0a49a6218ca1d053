"""Whether a torch device still computes: a product of small integers, which float32 does exactly."""

import threading

import torch

from zif.contract import Health


def check_health(array_device: str, deadline_s: float) -> Health:
    """Multiply on the device and compare with integer arithmetic on the host. Never raises, nor waits longer."""
    answer: list[Health] = []
    thread = threading.Thread(target=lambda: answer.append(_check(array_device)), daemon=True)
    thread.start()
    thread.join(deadline_s)
    return answer[0] if answer else Health(False, f"no answer within {deadline_s} s")


def _check(array_device: str) -> Health:
    try:
        return _multiply(array_device)
    except (RuntimeError, MemoryError) as error:
        return Health(False, f"a matrix product failed: {error!r}")


def _multiply(array_device: str) -> Health:
    left = torch.arange(64, dtype=torch.int64).view(8, 8)
    right = left.flip(0)
    expected = (left[:, :, None] * right[None, :, :]).sum(1)
    product = (left.float().to(array_device) @ right.float().to(array_device)).cpu().long()
    if torch.equal(product, expected):
        return Health(True, "a checked matrix product is right")
    return Health(False, f"a checked matrix product is wrong: {product.tolist()!r}, not {expected.tolist()!r}")
