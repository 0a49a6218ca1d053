"""Starting kernels: on a device, in the interpreter, or only recorded, so that they can be compiled without a device.

A family's functions take a `Launcher` and call it with the kernel, the grid, the arguments in the kernel's order, the
configuration from `launcher.tuning` and the kernel's compile-time constants; the configuration's tiles are constants
too.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zif.kernels.tuning import LaunchConfig, Tuning

Constant = int | float | bool | str | None
Argument = torch.Tensor | int | float | None


class Launcher(ABC):
    """Starts kernels with the tuning of one architecture."""

    def __init__(self, tuning: Tuning) -> None:
        self.tuning = tuning

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Argument], config: LaunchConfig, **constants: Any
    ) -> None:
        """Start `kernel` on a grid of programs; a grid without programs starts nothing.

        Tiles that the kernel does not name are for the host alone.
        """
        if 0 not in grid:
            tiles = {name: size for name, size in config.tiles if name in kernel.arg_names}
            self._start(kernel, grid, arguments, config, {**constants, **tiles})

    @abstractmethod
    def _start(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Argument],
        config: LaunchConfig,
        constants: dict[str, Constant],
    ) -> None:
        """Start, with all compile-time constants."""


class DeviceLauncher(Launcher):
    """Compile kernels on first use of a signature and run them on the device that holds the arrays."""

    def _start(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Argument],
        config: LaunchConfig,
        constants: dict[str, Constant],
    ) -> None:
        kernel[grid](*arguments, **constants, **config.compiler_options())


@dataclass(frozen=True, slots=True)
class Specialization:
    """One kernel with the types of its arguments and its constants: what a compiler needs to know.

    `signature` maps argument names to Triton's type names, or None where the value is the constant None or 1;
    `aligned` names arguments that are multiples of 16.
    """

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    aligned: frozenset[str]
    config: LaunchConfig

    @property
    def name(self) -> str:
        """Return the kernel's name."""
        return str(self.kernel.fn.__name__).strip("_")


@dataclass
class Recorder(Launcher):
    """Start nothing; keep what would have been compiled. Arrays may be on torch's device "meta"."""

    tuning: Tuning
    recorded: list[Specialization] = field(default_factory=list)

    def _start(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Argument],
        config: LaunchConfig,
        constants: dict[str, Constant],
    ) -> None:
        names = [name for name in kernel.arg_names if name not in constants]
        assert len(names) == len(arguments), f"{kernel.fn.__name__}: {names} got {len(arguments)} arguments"
        passed = dict(zip(names, arguments, strict=True))
        # What Triton makes constants of: nothing, and ones, unless the kernel takes them as any number.
        plain = _unspecialized(kernel)
        ones = {name for name, value in passed.items() if _is_int(value) and value == 1 and name not in plain}
        fixed = {name: value for name, value in passed.items() if value is None or name in ones}
        typed = {name: value for name, value in passed.items() if name not in fixed}
        specialization = Specialization(
            kernel,
            tuple((name, _type_name(value)) for name, value in typed.items()),
            tuple(sorted({**constants, **fixed}.items())),
            frozenset(name for name, value in typed.items() if name not in plain and _is_aligned(value)),
            config,
        )
        if specialization not in self.recorded:
            self.recorded.append(specialization)


_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e4m3fnuz: "*fp8e4b8",
    torch.float8_e5m2: "*fp8e5",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint64: "*u64",
}


def _unspecialized(kernel: Any) -> frozenset[str]:
    """Return the arguments that a kernel takes as any number. The interpreter keeps what it was told elsewhere."""
    told = vars(kernel).get("do_not_specialize") or vars(kernel).get("kwargs", {}).get("do_not_specialize")
    return frozenset(told or ())


def _type_name(value: Argument) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= int(value or 0) < 1 << 31 else "i64"


def _is_int(value: Argument) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_aligned(value: Argument) -> bool:
    if isinstance(value, torch.Tensor):
        return value.device.type == "meta" or value.data_ptr() % 16 == 0
    return _is_int(value) and int(value or 0) % 16 == 0
