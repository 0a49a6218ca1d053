"""zif, driven step by step. Runs in the environment that runs the benchmark."""

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import Any

from cpu.protocol import serve


class Stepped:
    """The engine inside `zif.LLM`; tokens are counted where the engine appends them."""

    def __init__(self, llm: Any) -> None:
        from zif import SamplingParams

        self._engine = llm.engine
        self._sampling = SamplingParams
        self._running: dict[str, tuple[int, Any, int]] = {}

    def add(self, index: int, prompt: list[int], num_output: int) -> None:
        sampling = self._sampling(temperature=0.0, max_tokens=num_output, ignore_eos=True, detokenize=False)
        generation = self._engine.submit(self._engine.check({"prompt_token_ids": prompt}, sampling), sampling)
        self._running[generation.request_id] = (index, generation, 0)

    def step(self) -> Sequence[tuple[int, int]]:
        changed = []
        for generation in self._engine.step():
            index, _, num_seen = self._running[generation.request_id]
            num_tokens = generation.samples[0].request.num_output_tokens
            changed.append((index, num_tokens - num_seen))
            self._running[generation.request_id] = (index, generation, num_tokens)
            if generation.finished:
                del self._running[generation.request_id]
        return changed


def load(options: Mapping[str, Any]) -> tuple[Stepped, dict[str, Any]]:
    import torch

    from zif import LLM

    settings = {"platform": "cpu", "dtype": options["dtype"], "max_model_len": options["max_model_len"]}
    settings |= {"kv_bytes": options["kv_bytes"]}
    settings |= {name: options[name] for name in ("quantization", "kv_cache_dtype") if name in options}
    llm = LLM(options["model"], **settings)
    versions = {name: importlib.metadata.version(name) for name in ("zif", "zif-cpu")} | {"torch": torch.__version__}
    return Stepped(llm), {"versions": versions, "configuration": {**settings, **_who_computes(llm)}}


def _who_computes(llm: Any) -> dict[str, str]:
    """Return the instruction set of the kernels, or why torch computes; and what the plan decided."""
    from zif_cpu.library import choose_kernels

    kernels = choose_kernels(os.environ.get("ZIF_CPU_ISA"))
    decisions = {decision.feature: decision.detail for decision in llm.plan.decisions}
    return {"kernels": kernels.isa or f"torch: {kernels.reason}", **decisions}


if __name__ == "__main__":
    serve(load)
