"""The embedded model's greedy text on a platform, in a process of its own, because Triton's mode is a process's."""

import json
import os
import subprocess
import sys
from pathlib import Path

MODEL = Path(__file__).resolve().parents[3] / "examples/embedded_model/checkpoint"
SCRIPT = """
import json, sys
from zif import LLM, SamplingParams
small = dict(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=128, kv_bytes=1 << 24, dtype="float32")
with LLM(sys.argv[1], platform=sys.argv[2], **small) as llm:
    sampling = SamplingParams(max_tokens=10, temperature=0.0)
    outputs = llm.generate(["Return a list of", "Raise an error", "The first"], sampling, use_tqdm=False)
    print(json.dumps([output.outputs[0].text for output in outputs]))
"""


def interpreted_texts(platform):
    """Return the texts for three prompts, with Triton's kernels interpreted where the platform has any."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(MODEL), platform]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
