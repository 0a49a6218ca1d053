"""A plugin whose device computes nothing and does what a prompt's first token says. For proofs through `zif serve`.

`install` makes it a platform of the processes that are given the environment it returns.
"""

import os
import time
from pathlib import Path

from zif.contract import Device, EngineConfig, ModelRunner, Plan, Platform, hookimpl
from zif.null.platform import NullPlatform
from zif.null.runner import NullRunner

NAME = "faulty"
HANG, COMPILE = 2000, 2004
LOAD_VARIABLE, COMPILE_VARIABLE = "FAULTY_LOAD_S", "FAULTY_COMPILE_S"
COMPILER = "torch._inductor.faulty"
"""The module whose code is on the stack while this device compiles: what a compiler of kernels looks like."""

_METADATA = "Metadata-Version: 2.1\nName: zif-faulty\nVersion: 1.0\n"


class FaultyPlatform(NullPlatform):
    """The null platform by another name."""

    name = NAME


class FaultyRunner(NullRunner):
    """Load as long as the environment says; hang or compile on certain tokens."""

    def load(self, model, progress):
        progress(1, 4)
        time.sleep(float(os.environ.get(LOAD_VARIABLE, "0")))
        super().load(model, progress)

    def submit(self, step):
        for start in step.started:
            if start.token_ids[0] == HANG:
                time.sleep(10**6)
            if start.token_ids[0] == COMPILE:
                seconds = float(os.environ[COMPILE_VARIABLE])
                eval("sleep(seconds)", {"__name__": COMPILER, "sleep": time.sleep, "seconds": seconds})
        return super().submit(step)


@hookimpl
def zif_platform() -> Platform:
    return FaultyPlatform()


@hookimpl
def zif_model_runner(config: EngineConfig, plan: Plan, device: Device) -> ModelRunner | None:
    return FaultyRunner(config) if plan.platform == NAME else None


def install(folder: Path) -> dict[str, str]:
    """Write what makes this module an installed plugin into `folder`; return the environment to start processes in."""
    metadata = folder / "zif_faulty-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(_METADATA)
    (metadata / "entry_points.txt").write_text(f"[zif.v1]\n{NAME} = {Path(__file__).stem}\n")
    paths = [str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
