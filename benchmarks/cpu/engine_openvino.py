"""OpenVINO GenAI: its continuous batching pipeline, driven step by step. Runs in OpenVINO's environment."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai

from cpu.protocol import serve


class Stepped:
    """A `ContinuousBatchingPipeline` and the handles of what it computes."""

    def __init__(self, pipeline: openvino_genai.ContinuousBatchingPipeline) -> None:
        self._pipeline = pipeline
        self._handles: dict[int, Any] = {}
        self._missing: dict[int, int] = {}
        self._num_added = 0

    def add(self, index: int, prompt: list[int], num_output: int) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = num_output
        config.ignore_eos = True
        config.do_sample = False
        tensor = openvino.Tensor(np.array([prompt], dtype=np.int64))
        self._handles[index] = self._pipeline.add_request(self._num_added, tensor, config)
        self._missing[index] = num_output
        self._num_added += 1

    def step(self) -> Sequence[tuple[int, int]]:
        self._pipeline.step()
        changed = []
        for index, handle in list(self._handles.items()):
            count = 0
            while handle.can_read():
                count += sum(len(output.generated_ids) for output in handle.read().values())
            if count:
                changed.append((index, count))
                self._missing[index] -= count
                if not self._missing[index]:
                    del self._handles[index]
        return changed


def load(options: Mapping[str, Any]) -> tuple[Stepped, dict[str, Any]]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 2048
    scheduler.max_num_seqs = 64
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = True
    # `cache_size` is in gigabytes.
    scheduler.cache_size = max(1, options["kv_bytes"] // 2**30)
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": options["threads"], **options["properties"]}
    pipeline = openvino_genai.ContinuousBatchingPipeline(options["model"], scheduler, "CPU", properties)
    versions = {"openvino-genai": openvino_genai.__version__, "openvino": openvino.__version__}
    about = {"scheduler": scheduler.to_string(), "properties": properties, "precisions": _precisions()}
    return Stepped(pipeline), {"versions": versions, "configuration": about}


def _precisions() -> dict[str, str]:
    """Return what the CPU device computes in and keeps KV in, unless told otherwise."""
    core = openvino.Core()
    names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    return {name: str(core.get_property("CPU", name)) for name in names}


if __name__ == "__main__":
    serve(load)
