"""Transformers: `generate` on padded batches, or its continuous batching. Runs in Transformers' environment."""

import queue
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from cpu.protocol import serve


class Batches:
    """`model.generate`: a batch is padded on the left and runs as long as its longest answer."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def answer(self, prompts: list[list[int]], num_outputs: list[int]) -> list[list[float]]:
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        times: list[float] = []

        def note(*_: Any, **__: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(prompts), dtype=torch.bool)

        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(num_outputs),
            min_new_tokens=max(num_outputs),
            do_sample=False,
            stopping_criteria=[note],
        )
        return [times[:count] for count in num_outputs]


class Continuous:
    """The manager of continuous batching, which computes in a thread and hands over results in a queue."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._num_added = 0
        self._indices: dict[str, list[int]] = {}

    def add(self, index: int, prompt: list[int], num_output: int) -> None:
        name = f"request {self._num_added}"
        self._num_added += 1
        self._indices[name] = [index, 0]
        self._manager.add_request(prompt, name, max_new_tokens=num_output, streaming=True, eos_token_id=-1)

    def step(self) -> Sequence[tuple[int, int]]:
        try:
            output = self._manager.get_result(timeout=0.05)
        except queue.Empty:
            output = None
        if output is None:
            if not self._manager.is_running():
                raise RuntimeError("continuous batching stopped; standard error says why")
            return []
        if output.error:
            raise RuntimeError(f"continuous batching failed: {output.error}")
        index, num_seen = self._indices[output.request_id]
        num_tokens = len(output.generated_tokens)
        self._indices[output.request_id][1] = max(num_seen, num_tokens)
        return [(index, num_tokens - num_seen)] if num_tokens > num_seen else []


def load(options: Mapping[str, Any]) -> tuple[Batches | Continuous, dict[str, Any]]:
    torch.set_num_threads(options["threads"])
    is_continuous = options["mode"] == "continuous"
    attention = "sdpa"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options["model"], dtype=getattr(torch, options["dtype"]), attn_implementation=attention
    ).eval()
    about = {"mode": options["mode"], "attention": attention, "threads": torch.get_num_threads()}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    if not is_continuous:
        return Batches(model), {"versions": versions, "configuration": about}
    batching = {"max_batch_tokens": 2048, "num_blocks": options["context_tokens"] // 32, "page_size": 32}
    manager = model.init_continuous_batching(
        generation_config=transformers.GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=64),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**batching),
    )
    manager.start()
    return Continuous(manager), {"versions": versions, "configuration": {**about, **batching}}


if __name__ == "__main__":
    serve(load)
