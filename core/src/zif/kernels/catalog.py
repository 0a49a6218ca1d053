"""Which kernels there are: every family with the shapes that models use, and what their code must show."""

from importlib import import_module

from zif.kernels.launch import Recorder, Specialization
from zif.kernels.tuning import Tuning

FAMILIES = (
    "activations",
    "attention",
    "blocks",
    "convolution",
    "delta_rule",
    "experts",
    "grammar",
    "greedy",
    "int4_linear",
    "latent_attention",
    "linear",
    "logprobs",
    "norms",
    "penalties",
    "quantization",
    "quantized_linear",
    "rotary",
    "routing",
    "sampling",
    "state_space",
)
"""Modules of this room with a function `representative`."""

WALKS_OVER_KV = frozenset({"paged_attention", "write_kv", "latent_decode"})
"""Kernels that read or write keys and values, with accesses of 16 bytes."""


def specializations(tuning: Tuning) -> list[Specialization]:
    """Return what every family starts with this tuning, each once."""
    recorder = Recorder(tuning)
    for family in FAMILIES:
        import_module(f"zif.kernels.{family}").representative(recorder)
    return recorder.recorded
