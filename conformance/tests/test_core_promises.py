"""What core promises to plugins and no platform can be asked: when hooks are called, and from which thread."""

import subprocess
import sys
from pathlib import Path

import pytest

_MODEL = Path(__file__).parents[2] / "examples/embedded_model/checkpoint"
_PLUGIN = """
import threading

hooks, threads = [], set()

class WatchedDevice(NullDevice):
    def __getattribute__(self, name):
        threads.add(threading.get_ident())
        return super().__getattribute__(name)

def _open(self, plan, rank):
    return WatchedDevice(plan)
ToyPlatform.open = _open

class WatchedRunner(NullRunner):
    def __getattribute__(self, name):
        threads.add(threading.get_ident())
        return super().__getattribute__(name)

@hookimpl
def zif_model_runner(config, plan):
    hooks.append("zif_model_runner")
    return WatchedRunner(config)

@hookimpl
def zif_scheduler():
    hooks.append("zif_scheduler")

@hookimpl
def zif_block_manager():
    hooks.append("zif_block_manager")
"""
_DRIVER = """
import sys, threading
from zif import LLM, SamplingParams
from zif_toy.plugin import hooks, threads
with LLM(sys.argv[1], platform="toy", max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16) as llm:
    started = list(hooks)
    prompts = [{"prompt_token_ids": [7, 8, 9, 10 + i]} for i in range(8)]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True), use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == 6 for output in outputs)
print(sorted(started), hooks == started, threads == {threading.get_ident()})
"""


@pytest.fixture
def said(lab):
    lab.plugin(f"from zif.null.runner import NullRunner\n{_PLUGIN}")
    command = [sys.executable, "-c", _DRIVER, str(_MODEL)]
    done = subprocess.run(command, env=lab.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hooks_are_called_at_start_up_only(said):
    assert said.startswith("['zif_block_manager', 'zif_model_runner', 'zif_scheduler'] True")


def test_a_device_is_called_from_one_thread(said):
    assert said.endswith(" True")
