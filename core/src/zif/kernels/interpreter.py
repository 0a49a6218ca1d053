"""Running kernels in Triton's interpreter, on arrays in host memory: slow, for proofs on machines without the device.

The interpreter must have been chosen before triton was imported (`TRITON_INTERPRET=1`): whoever opens the device does.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from zif.kernels.launch import Argument, Constant, Launcher
from zif.kernels.tuning import INTERPRETER_FOLDER, LaunchConfig, Tuning

_NARROW = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5: torch.float8_e5m2,
}
_PLAIN = {tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64}


class InterpretedLauncher(Launcher):
    """Run kernels one program after the other."""

    def __init__(self, tuning: Tuning | None = None) -> None:
        super().__init__(tuning or Tuning.read(INTERPRETER_FOLDER))

    def _start(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Argument],
        config: LaunchConfig,
        constants: dict[str, Constant],
    ) -> None:
        assert hasattr(kernel, "rewrite"), "triton was imported without TRITON_INTERPRET=1: kernels are compiled here"
        with _exact_conversions(), _patching_once(), np.errstate(all="ignore"):
            _InPlace(kernel.rewrite(), kernel.arg_names, grid)(*arguments, **constants)


class _InPlace(interpreter.GridExecutor):  # type: ignore[misc]
    """Host memory is written as it is: copying it back onto itself would copy the whole KV arena."""

    def _restore_args_dev(self, *arguments: Any) -> None: ...


class _NothingToRestore:
    """Stands for the interpreter's record of what it has patched."""

    def restore(self) -> None: ...


@contextlib.contextmanager
def _patching_once() -> Iterator[None]:
    """Keep the interpreter from giving triton's language its meaning anew at every call of every kernel and helper.

    That takes longer than most of them, and in such a process the language can have no other meaning. Sets a function
    of the interpreter's module, and puts it back; the language stays as the interpreter has made it.
    """
    patch = interpreter._patch_lang

    def patch_once(function: Any) -> _NothingToRestore:
        language = frozenset(id(value) for value in function.__globals__.values() if value in (tl, tl.core))
        if language not in _PATCHED:
            _PATCHED.add(language)
            patch(function)
            # Triton 3.6 converts an array of one element, which numpy no longer allows.
            tl.tensor.__index__ = lambda tensor: int(tensor.handle.data.item())
        return _NothingToRestore()

    interpreter._patch_lang = patch_once
    try:
        yield
    finally:
        interpreter._patch_lang = patch


_PATCHED: set[frozenset[int]] = set()
"""Which modules of triton's language this process's interpreter has patched: a fact about them, not about us."""


@contextlib.contextmanager
def _exact_conversions() -> Iterator[None]:
    """Round to the nearest even when narrowing, and multiply numbers that numpy knows as bits only, as devices do.

    Sets attributes of the interpreter's builder, and removes them.
    """
    builder = interpreter.interpreter_builder
    cast = type(builder).cast_impl

    def convert(handle: Any, target: Any, rounding: Any = None) -> Any:
        source, wanted = handle.dtype.scalar, target.scalar
        if source in _NARROW or wanted in _NARROW:
            return interpreter.TensorHandle(_converted(handle.data, source, wanted), wanted)
        return cast(builder, handle, target)

    def multiply(left: Any, right: Any, total: Any, *precision: Any) -> Any:
        product = np.matmul(_widened(left), _widened(right), dtype=total.data.dtype)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    exact = {"cast_impl": convert, "create_fp_to_fp": convert, "create_dot": multiply}
    for name, function in exact.items():
        setattr(builder, name, function)
    try:
        yield
    finally:
        for name in exact:
            delattr(builder, name)


def _widened(handle: Any) -> "np.ndarray[Any, Any]":
    source = handle.dtype.scalar
    return _converted(handle.data, source, tl.float32) if source in _NARROW else handle.data  # type: ignore[no-any-return]


def _converted(data: "np.ndarray[Any, Any]", source: Any, wanted: Any) -> "np.ndarray[Any, Any]":
    """Convert between element types, of which numpy knows some as bits only."""
    values = torch.from_numpy(np.ascontiguousarray(data))
    if source in _NARROW:
        values = values.view(torch.int16 if source == tl.bfloat16 else torch.uint8).view(_NARROW[source])
    if wanted not in _NARROW:
        dtype = _PLAIN.get(wanted)
        return values.to(dtype).numpy() if dtype else values.float().numpy().astype(interpreter._get_np_dtype(wanted))
    bits = values.to(_NARROW[wanted]).view(torch.int16 if wanted == tl.bfloat16 else torch.uint8).numpy()
    return bits.view(interpreter._get_np_dtype(wanted))
