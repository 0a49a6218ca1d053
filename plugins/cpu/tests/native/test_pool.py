"""The library's threads: asleep when idle, safe with several callers, gone and replaced in a child process."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from zif_cpu.library import Library, load_library

from .test_linear import multiply


def test_idle_threads_use_no_processor_time(library):
    multiply(library, torch.randn(4, 64), torch.randn(256, 64))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_callers_in_several_threads_get_their_own_results(library, dtype):
    """Arguments that need scratch memory, of several sizes: one caller's must not become another's."""
    weight = torch.randn(100, 128).to(dtype)
    inputs = [torch.randn(tokens, 128).to(dtype) for tokens in (5, 33, 60)]
    expected = [multiply(library, x, weight) for x in inputs]
    wrong = []

    def call(x, alone):
        for _ in range(100):
            if not torch.equal(multiply(library, x, weight), alone):
                wrong.append(len(x))

    threads = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_changing_the_number_of_threads_between_calls(library):
    x, weight = torch.randn(3, 64), torch.randn(200, 64)
    for num_threads in (1, 4, 2, 8, 1, 3):
        assert library.raw.zif_cpu_use_threads(num_threads) == 0
        assert torch.allclose(multiply(library, x, weight), x @ weight.T, atol=1e-3)


def test_a_child_process_computes_too():
    """A fork has none of the parent's threads; what waits for them would wait for ever."""
    if not isinstance(load_library(), Library):
        pytest.skip(str(load_library()))
    code = textwrap.dedent(
        """
        import os
        from struct import Struct
        import numpy as np
        from zif_cpu.library import load_library

        library = load_library()
        library.use(library.isas[-1], 2)
        x, weight, y = np.ones((2, 64), np.float32), np.ones((128, 64), np.float32), np.zeros((2, 128), np.float32)

        def multiply():
            at = [array.ctypes.data for array in (x, weight, y)]
            library.raw.zif_cpu_linear(Struct("4P4q2iP").pack(at[0], at[1], 0, at[2], 64, 2, 64, 128, 0, 0, 0))
            return int(y.sum())

        assert multiply() == 2 * 128 * 64
        child = os.fork()
        if child == 0:
            os._exit(0 if multiply() == 2 * 128 * 64 else 1)
        print(os.waitpid(child, 0)[1], multiply())
        """
    )
    environment = {name: value for name, value in os.environ.items() if name != "ZIF_CPU_ISA"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["0", str(2 * 128 * 64)], done.stderr


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two processors to choose from",
)
def test_a_thread_leaves_the_processor_of_the_one_that_calls():
    if not isinstance(load_library(), Library):
        pytest.skip(str(load_library()))
    code = textwrap.dedent(
        """
        import os
        from pathlib import Path
        from struct import Struct
        import numpy as np
        from zif_cpu.library import load_library

        def threads():
            return {int(task.name) for task in Path("/proc/self/task").iterdir()}

        library, before = load_library(), threads()
        library.raw.zif_cpu_use_threads(2)
        (worker,) = threads() - before
        shared = min(os.sched_getaffinity(0))
        for thread in (0, worker):
            os.sched_setaffinity(thread, {shared})
        x, weight, y = (np.ones(shape, np.float32) for shape in ((64, 512), (512, 512), (64, 512)))
        at = [array.ctypes.data for array in (x, weight, y)]
        for _ in range(20):
            library.raw.zif_cpu_linear(Struct("4P4q2iP").pack(at[0], at[1], 0, at[2], 512, 64, 512, 512, 0, 0, 0))
        assert (y == 512).all()
        assert shared not in os.sched_getaffinity(worker), os.sched_getaffinity(worker)
        """
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
