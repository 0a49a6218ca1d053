"""An engine process on the null platform whose device does what the first token of a prompt says. Run by tests.

python faulty_child.py [start-fails | start-hangs | ready-then-nonsense]
"""

import os
import sys
import time

from zif.errors import DeviceLostError
from zif.null.runner import NullRunner
from zif.serving.engine import process
from zif.serving.engine.channel import EngineEnd

HANG, RAISE, EXIT, SLOW, COMPILE, POISON, NONSENSE = range(2000, 2007)

_submit, _load = NullRunner.submit, NullRunner.load


def submit(self, step):
    for start in step.started:
        if start.token_ids[0] == HANG:
            time.sleep(600)
        if start.token_ids[0] == RAISE:
            raise DeviceLostError("the device caught fire")
        if start.token_ids[0] == POISON:
            raise ValueError("the kernel of /opt/kernels cannot hold a value")
        if start.token_ids[0] == EXIT:
            os._exit(9)
        if start.token_ids[0] == SLOW:
            time.sleep(0.3)
        if start.token_ids[0] == COMPILE:
            eval("sleep(5)", {"__name__": "torch._inductor.codegen", "sleep": time.sleep})
    future = _submit(self, step)
    nonsense = {start.request_id for start in step.started if start.token_ids[0] == NONSENSE}
    future.result().faults.update(dict.fromkeys(nonsense, "the model gave NaN logits for this request"))
    future.result().unsound |= nonsense
    return future


def load(self, model, progress):
    if sys.argv[1:] == ["start-fails"]:
        raise RuntimeError("no such device")
    if sys.argv[1:] == ["start-hangs"]:
        progress(1, 3)
        time.sleep(600)
    if sys.argv[1:] == ["ready-then-nonsense"]:
        EngineEnd.receive = lambda self, max_messages=1: self._socket.send(b"\xff nonsense") or []
    _load(self, model, progress)


if __name__ == "__main__":
    NullRunner.submit, NullRunner.load = submit, load
    sys.exit(process.main())
