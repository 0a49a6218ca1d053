"""What is compared: engines with the weights they read, and where each process and each file of weights comes from."""

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu.environments import PeerError, python_of
from cpu.workloads import LONG_TOKENS

FOLDER = Path(__file__).parents[1]
KV_BYTES = 2 * 2**30
"""18,724 tokens of the dense model in bfloat16: more than any workload holds at once."""
KV_TOKENS = 18_432
MAX_LENGTH = LONG_TOKENS + 256
_THREADS = {"OMP_NUM_THREADS": "{threads}", "ZIF_CPU_THREADS": "{threads}"}


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine with one kind of weights.

    `weights` has the model's name in place of "{model}"; values of `variables` have the number of threads and the list
    of their cores in place of "{threads}" and "{cores}".
    """

    name: str
    title: str
    scheme: str
    environment: str
    weights: str
    options: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=lambda: dict(_THREADS))
    max_rounds: int = 99
    by_default: bool = True

    @property
    def module(self) -> str:
        """Return the module that serves it."""
        return f"cpu.engine_{self.environment}"

    def weights_path(self, folder: Path, model: str) -> Path:
        """Return the weights of a model in the form that the engine reads."""
        return folder / "models" / self.weights.format(model=model)


# Left to itself vLLM keeps a core free, which is half of two.
_VLLM = {"VLLM_CPU_OMP_THREADS_BIND": "{cores}"} | {
    "VLLM_CPU_KVCACHE_SPACE": str(KV_BYTES // 2**30),
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
_VLLM_AUTO = {**_VLLM, "VLLM_CPU_OMP_THREADS_BIND": "auto"}
_BF16 = {"dtype": "bfloat16", "max_model_len": MAX_LENGTH, "kv_bytes": KV_BYTES}
_INT8 = {**_BF16, "quantization": "int8"}
_KV8 = {"kv_cache_dtype": "int8"}  # what OpenVINO's CPU device does unless told otherwise
_LLAMA = {"context_tokens": KV_TOKENS}
_OPENVINO: dict[str, Any] = {"kv_bytes": KV_BYTES, "properties": {}}
_TRANSFORMERS = {"dtype": "bfloat16", "context_tokens": KV_TOKENS}

ENGINES = (
    Engine("zif-bf16", "zif, bf16", "bf16", "zif", "{model}", _BF16),
    Engine("zif-bf16-kv8", "zif, bf16, KV in 8 bits", "bf16", "zif", "{model}", {**_BF16, **_KV8}),
    Engine("vllm-bf16", "vLLM-CPU, bf16", "bf16", "vllm", "{model}", _BF16, _VLLM),
    Engine(
        "vllm-bf16-compiled",
        "vLLM-CPU, bf16, compiled",
        "bf16",
        "vllm",
        "{model}",
        {**_BF16, "compiled": True},
        _VLLM,
        by_default=False,
    ),
    Engine(
        "vllm-bf16-auto",
        "vLLM-CPU, bf16, one core kept free",
        "bf16",
        "vllm",
        "{model}",
        _BF16,
        _VLLM_AUTO,
        by_default=False,
    ),
    Engine("vllm-fp32", "vLLM-CPU, fp32", "bf16", "vllm", "{model}", {**_BF16, "dtype": "float32"}, _VLLM),
    Engine("openvino-fp16", "OpenVINO GenAI, fp16 weights", "bf16", "openvino", "{model}-ov-fp16", _OPENVINO),
    Engine("llama-bf16", "llama.cpp, BF16", "bf16", "llama", "{model}-bf16.gguf", _LLAMA),
    Engine(
        "transformers-bf16",
        "Transformers generate, bf16",
        "bf16",
        "transformers",
        "{model}",
        {**_TRANSFORMERS, "mode": "generate"},
        max_rounds=1,
    ),
    Engine(
        "transformers-cb",
        "Transformers continuous batching, bf16",
        "bf16",
        "transformers",
        "{model}",
        {**_TRANSFORMERS, "mode": "continuous"},
        max_rounds=1,
    ),
    Engine("zif-int8", "zif, int8", "int8", "zif", "{model}", _INT8),
    Engine("zif-int8-kv8", "zif, int8, KV in 8 bits", "int8", "zif", "{model}", {**_INT8, **_KV8}),
    Engine("vllm-int8", "vLLM-CPU, int8 (compressed-tensors)", "int8", "vllm", "{model}-int8", _BF16, _VLLM),
    Engine("openvino-int8", "OpenVINO GenAI, int8", "int8", "openvino", "{model}-ov-int8", _OPENVINO),
    Engine("llama-q8_0", "llama.cpp, Q8_0", "int8", "llama", "{model}-q8_0.gguf", _LLAMA),
)


def engine(name: str) -> Engine:
    """Return the engine of that name. Raises `PeerError` with those there are."""
    for entry in ENGINES:
        if entry.name == name:
            return entry
    raise PeerError(f"there is no engine {name!r}; there are {', '.join(entry.name for entry in ENGINES)}")


def prepare_weights(folder: Path, engine: Engine, model: str) -> Path:
    """Write the weights that the engine reads unless they are there. Raises `PeerError` when that fails."""
    target = engine.weights_path(folder, model)
    if target.exists():
        return target
    if engine.environment not in ("zif", "transformers") and engine.weights != "{model}":
        prepare_weights(folder, ENGINES[0], model)
    partial = target.with_name(target.name + ".partial")
    _remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(
        _converter(folder, engine, model, partial),
        cwd=FOLDER,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if run.returncode:
        _remove(partial)
        raise PeerError(f"the weights {target.name!r} could not be made: {run.stderr.strip()[-1200:]}")
    partial.rename(target)
    return target


def command_of(folder: Path, engine: Engine) -> list[str]:
    """Return the command that serves the engine, but for its options."""
    return [str(python_of(folder, engine.environment)), "-m", engine.module]


def options_of(folder: Path, engine: Engine, model: str, threads: int) -> dict[str, Any]:
    """Return what the engine's process is told."""
    return {"model": str(engine.weights_path(folder, model)), "threads": threads, **engine.options}


def variables_of(engine: Engine, threads: int) -> dict[str, str]:
    """Return the environment variables that the engine's process gets on top of this one's."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:threads])
    return {name: value.format(threads=threads, cores=cores) for name, value in engine.variables.items()}


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _converter(folder: Path, engine: Engine, model: str, target: Path) -> list[str]:
    checkpoint = folder / "models" / model
    if engine.environment == "llama":
        python = str(python_of(folder, "llama"))
        kind = "BF16" if "bf16" in engine.weights else "Q8_0"
        return [python, "-m", "cpu.gguf_file", str(checkpoint), str(target), kind]
    if engine.environment == "openvino":
        exporter = str(python_of(folder, "openvino").with_name("optimum-cli"))
        kind = "fp16" if "fp16" in engine.weights else "int8"
        named = ["--task", "text-generation-with-past", "--weight-format", kind]
        return [exporter, "export", "openvino", "--model", str(checkpoint), *named, str(target)]
    quantized = engine.weights.removeprefix("{model}")
    return [str(python_of(folder, "zif")), "-m", "cpu.checkpoints", str(target), model + quantized]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
