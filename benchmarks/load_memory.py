"""How much memory and time loading takes, for a checkpoint of about 1.2 GB.

The physics: weights must be held once (W bytes). Reading a file range straight into that memory adds nothing that
counts as this process's own, while a mapped file would count each touched page a second time until the kernel takes it
back (2 W). What else is resident is the interpreter and torch (0.3 to 0.4 GB) and a staging buffer of a few megabytes.
Time is bounded by writing W bytes once (page faults), reading them once from the page cache or the disk, and one pass
over them that looks for values that are not finite.

Bound: peak resident memory <= 1.15 * W + 400 MB. The script exits with 1 when it is broken.

    python benchmarks/load_memory.py [--folder FOLDER] [--quantization int8]

builds a random checkpoint with the shape of Qwen3-0.6B in a temporary folder (or uses the one given), loads it in a
fresh process, and prints the peak as the kernel counts it (VmHWM), which includes file pages mapped by the process.
With quantization W is what codes and scales take, and the numbers that they are rounded from must not show; the first
forward is left out then, because the reference operators decode whole matrices.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEAK_FACTOR = 1.15
PEAK_SLACK_BYTES = 400_000_000


def peak_resident_bytes() -> int:
    """Read the high-water mark of this process's resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status; this benchmark needs Linux")


def measure(folder: Path, quantization: str | None) -> None:
    """Load the model and compute one token, in this process; print what it took as JSON."""
    started = time.perf_counter()
    import torch

    from zif.host.memory import HostAllocator
    from zif.models.description import ModelSource, describe_model
    from zif.models.weights import load_decoder
    from zif.reference.ops import ReferenceOps

    imported = time.perf_counter()
    description = describe_model(ModelSource(folder, quantization=quantization))
    described, described_cpu = time.perf_counter(), time.process_time()
    model = load_decoder(description, ReferenceOps(), HostAllocator(1 << 40), "cpu", lambda done, total: None)
    loaded, loaded_cpu = time.perf_counter(), time.process_time()
    peak = peak_resident_bytes()
    with torch.inference_mode():
        zero = torch.zeros(1, dtype=torch.int64)
        if quantization is None:
            model.logits(model.forward(zero, zero, lambda layer, query, key, value, params: query))
    print(
        json.dumps(
            {
                "weight_bytes": description.weight_bytes,
                "peak_bytes": peak,
                "import_s": imported - started,
                "describe_s": described - imported,
                "load_s": loaded - described,
                "load_cpu_s": loaded_cpu - described_cpu,
                "first_forward_s": time.perf_counter() - loaded,
            }
        )
    )


def report(result: dict[str, float]) -> bool:
    """Print a measurement; say whether the bound holds."""
    weights, peak = result["weight_bytes"], result["peak_bytes"]
    bound = PEAK_FACTOR * weights + PEAK_SLACK_BYTES
    print(f"weights {weights / 1e9:.3f} GB, peak {peak / 1e9:.3f} GB: {peak / weights:.3f} x weights")
    print(f"bound   {bound / 1e9:.3f} GB ({PEAK_FACTOR} x weights + {PEAK_SLACK_BYTES / 1e6:.0f} MB)")
    print(
        f"import {result['import_s']:.2f} s, describe {result['describe_s']:.3f} s, load {result['load_s']:.2f} s "
        f"({weights / result['load_s'] / 1e9:.2f} GB/s; processor {result['load_cpu_s']:.2f} s), "
        f"first forward {result['first_forward_s']:.2f} s"
    )
    return peak <= bound


def main() -> int:
    """Build where needed, measure in a fresh process, report."""
    parser = argparse.ArgumentParser(description="Measure peak memory and time of loading a 1.2 GB checkpoint.")
    parser.add_argument("--folder", type=Path, help="a model folder to use instead of a random one")
    parser.add_argument("--quantization", choices=("int8", "int4"), help="round weights to integers on load")
    parser.add_argument("--measure", action="store_true", help="measure in this process (used by the script itself)")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.folder, arguments.quantization)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.folder is None:
            from cpu.checkpoints import write  # here, because it imports torch, whose import is measured

            write(folder, "dense")
        command = [sys.executable, __file__, "--measure", "--folder", str(folder)]
        command += ["--quantization", arguments.quantization] if arguments.quantization else []
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return 0 if report(json.loads(output)) else 1


if __name__ == "__main__":
    sys.exit(main())
