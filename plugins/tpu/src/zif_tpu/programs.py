"""Programs: functions on XLA arrays, traced and compiled once for fixed shapes, then run without tracing.

Tracing a step costs the host more than starting it does, and a step that is traced may turn out to need a compilation.
So a program keeps what tracing found: the hash of the compiled computation, and which of its inputs are arguments and
which are constants, weights above all. Running it hands XLA the inputs and nothing else. torch_xla's own bridge from
Dynamo to compiled graphs goes the same way (torch_xla/_dynamo/dynamo_bridge.py).

An argument may be donated: its memory becomes that of the result of the same shape, and the old array is void. That is
how the KV cache is updated in place.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as metrics
import torch_xla.runtime as xr
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

from zif.errors import ZifError

_lib = torch_xla._XLAC

Function = Callable[..., Sequence[torch.Tensor]]


class CompilationError(ZifError):
    """A program could not be made: XLA refused it, or it took too long."""


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled function. `inputs` are its constants, with None at the places of arguments, which `places` lists.

    places: (index of an input, index of the argument).
    """

    graph: str
    inputs: tuple[torch.Tensor | None, ...]
    places: tuple[tuple[int, int], ...]

    def __call__(self, *arguments: torch.Tensor) -> list[torch.Tensor]:
        """Start the program and return its results, which are under way. Donated arguments are void."""
        inputs = list(self.inputs)
        for place, argument in self.places:
            inputs[place] = arguments[argument]
        if xr.is_spmd():
            # Over several devices torch_xla hands out arrays before they are there, and takes only those that are.
            xm.wait_device_ops()
        results: list[torch.Tensor] = _lib._run_cached_graph(self.graph, inputs)
        return results


def compile_program(
    function: Function, arguments: Sequence[torch.Tensor], donated: frozenset[int], deadline_s: float
) -> Program:
    """Trace `function` for arguments of these shapes and compile it; runs nothing and leaves the arguments as they are.

    The function makes new arrays and writes to none. `donated` are indices of arguments. Raises `CompilationError` when
    XLA refuses, when an operation would leave the device, or after `deadline_s`: what was begun cannot be called off,
    and goes on beside.
    """
    for index in donated:
        _lib._set_buffer_donation(arguments[index], True)
    try:
        return _compiled(function, arguments, deadline_s)
    finally:
        for index in donated:
            _lib._set_buffer_donation(arguments[index], False)


def _compiled(function: Function, arguments: Sequence[torch.Tensor], deadline_s: float) -> Program:
    before = _operations_off_device()
    try:
        results = list(function(*arguments))
    except RuntimeError as error:
        raise CompilationError(f"XLA cannot take the program in: {error}") from error
    if left := [name for name, count in _operations_off_device().items() if count != before.get(name, 0)]:
        raise CompilationError(f"operations that XLA does not compile: {', '.join(sorted(left))}")
    _, values = _lib._get_tensors_xla_device_data_node(results)
    arguments_at = {handle: index for index, handle in enumerate(_lib._get_tensors_handle(list(arguments)))}
    handles = enumerate(_lib._get_tensors_handle(list(values)))
    places = tuple((place, arguments_at[handle]) for place, handle in handles if handle in arguments_at)
    at_arguments = {place for place, _ in places}
    inputs = tuple(None if place in at_arguments else value for place, value in enumerate(values))
    with alias_with_buffer_donor_config():
        graph = _lib._get_graph_hash(results)
        _compile(results, deadline_s)
    return Program(graph, inputs, places)


@dataclass(slots=True)
class _Outcome:
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


def _compile(results: list[torch.Tensor], deadline_s: float) -> None:
    outcome = _Outcome()

    def work() -> None:
        try:
            _lib._xla_warm_up_cache(results, [])
        except Exception as error:
            outcome.error = error
        outcome.done.set()

    thread = threading.Thread(target=work, name="xla-compilation", daemon=True)
    thread.start()
    if not outcome.done.wait(deadline_s):
        _late.append(thread)
        raise CompilationError(
            f"compilation takes longer than {deadline_s:g} s; raise ZIF_TPU_COMPILE_DEADLINE_S to wait longer"
        )
    if outcome.error is not None:
        raise CompilationError(f"XLA refused the program: {outcome.error}") from outcome.error


_late: list[threading.Thread] = []
"""Compilations that nobody waits for any more."""


def wait_for_late_compilations(deadline_s: float) -> None:
    """Let compilations end that went past their deadlines: a process that exits under one of them aborts."""
    ends_at = time.monotonic() + deadline_s
    while _late and time.monotonic() < ends_at:
        _late.pop().join(max(0.0, ends_at - time.monotonic()))


def _operations_off_device() -> dict[str, int]:
    """Count the operations that have run on the host because XLA has no lowering (torch_xla's counters), by name."""
    return {name: metrics.counter_value(name) for name in metrics.counter_names() if name.startswith("aten::")}
