"""The two attentions of this plugin against float64, over the worst cache that the contract allows, on the host."""

import importlib.util
from types import SimpleNamespace

import pytest

from zif.host.memory import HostAllocator
from zif_conformance.gates import ratio
from zif_conformance.oracle.paged import PagedStep
from zif_conformance.oracle.sequences import AttentionCase, Sequences
from zif_intel.gathered import GatheredAttention

CASES = {
    "one": AttentionCase(((1, 40),)),
    "decode": AttentionCase(((1, 40), (1, 7), (1, 16), (1, 17), (1, 1))),
    "chunks": AttentionCase(((7, 40), (16, 16), (3, 3))),
    "mixed": AttentionCase(((1, 40), (7, 40), (1, 3), (16, 33))),
    "window": AttentionCase(((1, 40), (7, 40), (1, 3), (16, 33)), window=9),
    "soft cap": AttentionCase(((1, 40), (7, 40)), softcap=5.0),
    "sinks": AttentionCase(((1, 40), (7, 40)), sinks=True),
    "sinks and window": AttentionCase(((1, 40), (7, 40)), sinks=True, window=9),
}


def _gathered():
    return GatheredAttention("cpu")


def _ipex():
    if importlib.util.find_spec("intel_extension_for_pytorch") is None:
        pytest.skip("IPEX is not installed: `make test-intel` has it")
    import intel_extension_for_pytorch  # noqa: F401

    from zif_intel.ipex_attention import IpexAttention

    return IpexAttention()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [_gathered, _ipex], ids=["gathered", "ipex"])
def test_attention_is_as_exact_as_its_dtype(make, case, dtype):
    from dataclasses import replace

    device = SimpleNamespace(
        attention=make(), allocator=HostAllocator(1 << 30), array_device="cpu", synchronize=lambda: None
    )
    sequences = Sequences.random(replace(CASES[case], dtype=dtype))
    with PagedStep(device, sequences) as step:
        got = step.run()
    runs = [run.flatten(1) for run in sequences.declared()]
    result = ratio(got.flatten(1), sequences.exact().flatten(1), runs)
    assert result.measured <= result.limit, result
