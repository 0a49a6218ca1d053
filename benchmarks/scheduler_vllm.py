"""Time vLLM's own v1 scheduler on the traffic of `scheduler.py`, without a model, a worker or a device.

What it is: a small process that reads one case per line (JSON) from standard input, times `schedule()` plus
`update_from_output()` for every step, and answers with one line of JSON. Between two lines it sleeps, so that whoever
asks can take turns with it. What it is not: a benchmark of vLLM as an engine. The results of the steps are prepared
before the clock starts; the hashes of full blocks are part of the update, as they are in the engine. Statistics are
off, scheduling is synchronous, prefix caching is on with the default hash.

Called by `scheduler.py --vllm-python PATH`, which says how to get the environment that this file runs in. zif is not
imported. The first line of the answers says the versions.
"""

import contextlib
import gc
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import vllm
from scheduler_traffic import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, VOCAB_SIZE, Case, summarize
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": NUM_KV_HEADS,
    "max_position_embeddings": 1 << 20,
    "torch_dtype": "bfloat16",
}


def configuration(case: Case, folder: str) -> VllmConfig:
    """Return vLLM's settings for a model of which only the configuration exists, written to `folder`."""
    Path(folder, "config.json").write_text(json.dumps(_MODEL))
    model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=case.max_tokens)
    limits = SchedulerConfig(
        max_model_len=case.max_tokens,
        is_encoder_decoder=False,
        max_num_seqs=case.num_requests,
        max_num_batched_tokens=case.max_step_tokens,
        async_scheduling=False,
    )
    cache = CacheConfig(block_size=case.block_size, enable_prefix_caching=True)
    config = VllmConfig(
        model_config=model, scheduler_config=limits, cache_config=cache, device_config=DeviceConfig(device="cpu")
    )
    config.cache_config.num_gpu_blocks = case.num_blocks
    return config


def scheduler_with_requests(case: Case) -> Scheduler:
    """Return vLLM's scheduler with every request of the case waiting."""
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(case, folder)
    assert not config.scheduler_config.async_scheduling, "the comparison is of synchronous scheduling"
    assert config.cache_config.block_size == case.block_size, "vLLM changed the block size"
    spec = FullAttentionSpec(
        block_size=case.block_size, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_DIM, dtype=torch.bfloat16
    )
    group = KVCacheGroupSpec([f"layers.{index}" for index in range(NUM_LAYERS)], spec)
    layout = KVCacheConfig(num_blocks=case.num_blocks, kv_cache_tensors=[], kv_cache_groups=[group])
    scheduler = Scheduler(config, layout, StructuredOutputManager(config), block_size=case.block_size)
    hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
    init_none_hash(hash_function)
    hasher = get_request_block_hasher(case.block_size, hash_function)
    for index in range(case.num_requests):
        sampling = SamplingParams(max_tokens=case.num_steps + 2, ignore_eos=True)
        scheduler.add_request(Request(str(index), case.prompt(index), sampling, None, block_hasher=hasher))
    return scheduler


def prepared_output(plan: SchedulerOutput, sampled: list[list[int]]) -> ModelRunnerOutput:
    """Return what a worker would hand back for `plan`."""
    ids = list(plan.num_scheduled_tokens)
    return ModelRunnerOutput(ids, {name: row for row, name in enumerate(ids)}, sampled_token_ids=sampled)


def step(scheduler: Scheduler, case: Case) -> float:
    """Schedule and update once; return the microseconds of the two, without those of preparing the result."""
    started = time.perf_counter()
    plan = scheduler.schedule()
    planned = time.perf_counter()
    result = prepared_output(plan, case.sampled())
    resumed = time.perf_counter()
    outputs = scheduler.update_from_output(plan, result)
    updated = time.perf_counter()
    num_outputs = sum(len(client.outputs) for client in outputs.values())
    assert num_outputs == case.num_requests, "a request was left out of the step"
    return (planned - started + updated - resumed) * 1e6


def measure(case: Case) -> dict[str, float]:
    """Time every step of one run after the one that computes the prompts."""
    scheduler = scheduler_with_requests(case)
    step(scheduler, case)
    gc.collect()
    gc.freeze()
    times = [step(scheduler, case) for _ in range(case.num_steps)]
    gc.unfreeze()
    return asdict(summarize(case.num_requests, times))


def main() -> None:
    """Answer cases until standard input ends; what vLLM prints goes to standard error."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        print(json.dumps({"vllm": vllm.__version__, "python": sys.version.split()[0]}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(measure(Case(**json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    main()
