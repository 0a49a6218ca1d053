"""The native library: where it lies, how it is loaded, what its functions take. Imports no array library.

Its C ABI is `native/include/zif_cpu.h`; every function there has its argument types here. Called by the platform, the
operators and attention.
"""

import ctypes
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import MappingProxyType

from zif.errors import ConfigError, PlatformUnavailableError
from zif_cpu.settings import keeps_memory, library_file

ABI = 6
"""The version of the C ABI that this package calls."""

NO_KERNELS = "torch"
"""The value of `ZIF_CPU_ISA` that asks for torch in place of native kernels."""

DTYPE_CODES: Mapping[str, int] = MappingProxyType({"float32": 0, "bfloat16": 1, "float16": 2})
INT8_CODE = 3
"""The code of int8, which only caches have."""
ACTIVATION_CODES: Mapping[str, int] = MappingProxyType({"silu": 0, "gelu": 1, "gelu_tanh": 2, "swiglu_clamped": 3})

_FILE = "libzif_cpu.dylib" if sys.platform == "darwin" else "libzif_cpu.so"

_P, _I, _F, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32


class AttentionCall(ctypes.Structure):
    """`zif_cpu_attention` of the C ABI."""

    _fields_ = (
        *((name, _P) for name in ("query", "output", "keys", "values", "sinks")),
        *((name, _P) for name in ("requests", "query_start", "seq_lens", "block_table")),
        *((name, _I) for name in ("query_stride", "block_stride", "table_stride", "num_requests")),
        *((name, _I) for name in ("heads", "kv_heads", "head_dim", "block_size", "window")),
        ("scale", _F),
        ("softcap", _F),
        ("dtype", _N),
        ("cache", _N),
        ("batch_invariant", _N),
    )


class RowsCall(ctypes.Structure):
    """`zif_cpu_kv_rows` of the C ABI."""

    _fields_ = (
        *((name, _P) for name in ("key", "value", "keys", "values", "slots")),
        *((name, _I) for name in ("key_stride", "value_stride", "block_stride")),
        *((name, _I) for name in ("tokens", "kv_heads", "head_dim", "block_size")),
        ("dtype", _N),
        ("cache", _N),
    )


class ExpertsCall(ctypes.Structure):
    """`zif_cpu_experts_call` of the C ABI."""

    _fields_ = (
        *((name, _P) for name in ("x", "gate_up", "gate_up_bias", "down", "down_bias", "weights", "ids", "y")),
        *((name, _I) for name in ("x_stride", "tokens", "channels", "inner", "experts", "chosen")),
        ("activation", _N),
        ("dtype", _N),
    )


class QuantizedCall(ctypes.Structure):
    """`zif_cpu_quantized` of the C ABI."""

    _fields_ = (
        *((name, _P) for name in ("codes", "scales", "zeros")),
        *((name, _I) for name in ("outputs", "inputs", "group")),
        ("bits", _N),
        ("dynamic_activations", _N),
    )


class QuantizedExpertsCall(ctypes.Structure):
    """`zif_cpu_quantized_experts_call` of the C ABI."""

    _fields_ = (
        ("gate_up", QuantizedCall),
        ("down", QuantizedCall),
        *((name, _P) for name in ("x", "gate_up_bias", "down_bias", "weights", "ids", "y")),
        *((name, _I) for name in ("x_stride", "tokens", "experts", "chosen")),
        ("activation", _N),
        ("dtype", _N),
    )


_ARGUMENTS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        # Structs, by address or packed into bytes.
        "linear": (_P,),
        "rms_norm": (_P,),
        "add_rms_norm": (_P,),
        "rotate": (_P,),
        "gated_activation": (_P,),
        "gated_linear": (_P,),
        "store_kv": (_P,),
        "attend": (_P,),
        "quantized_linear": (_P,),
        "gated_quantized_linear": (_P,),
        "choose": (_P,),
        "unpack_weight": (_P,),
        "run": (_P, _I),
    }
)


@dataclass(frozen=True, slots=True)
class Library:
    """A loaded library. `raw` has its functions; `isas` are those that serve here, best last."""

    raw: ctypes.CDLL
    isas: tuple[str, ...]

    def use(self, isa: str, num_threads: int) -> None:
        """Choose one of `isas` and the number of threads, for the whole process; memory that is freed stays with it.

        Raises `PlatformUnavailableError` when the system gives no more threads.
        """
        assert isa in self.isas, f"isa={isa!r} is none of {self.isas!r}"
        self.raw.zif_cpu_use_isa(isa.encode())
        if keeps_memory():
            self.raw.zif_cpu_keep_memory()
        if self.raw.zif_cpu_use_threads(num_threads):
            raise PlatformUnavailableError(
                f"the system gives this process no {num_threads} threads; set ZIF_CPU_THREADS lower, or raise its limit"
            )


@dataclass(frozen=True, slots=True)
class Kernels:
    """What computes: the library with one of its instruction sets, or torch and why."""

    library: Library | None
    isa: str
    reason: str = ""


def choose_kernels(asked: str | None) -> Kernels:
    """Choose what computes. asked: an instruction set, "torch", or None for the best.

    Raises `ConfigError` for an instruction set that does not serve here.
    """
    if asked == NO_KERNELS:
        return Kernels(None, "", "ZIF_CPU_ISA asks for it")
    library = load_library()
    isas = library.isas if isinstance(library, Library) else ()
    if asked is not None and asked not in isas:
        serving = f"{', '.join((*isas, NO_KERNELS))}: what the kernels were compiled for and this processor runs"
        raise ConfigError(
            f"environment variable ZIF_CPU_ISA={asked!r} must be {'one of ' if isas else ''}{serving}"
            + (f" ({library})" if isinstance(library, str) else "")
        )
    return Kernels(None, "", library) if isinstance(library, str) else Kernels(library, asked or isas[-1])


@cache
def load_library() -> Library | str:
    """Load the library, once per process. Returns why there is none in place of one, in a sentence."""
    found = [path for path in _places() if path.is_file()]
    if not found and library_file():
        return f"ZIF_CPU_LIBRARY={str(library_file())!r} is no file; unset it, or build that library"
    if not found:
        return (
            "zif-cpu was installed without its native kernels; install a C++20 compiler (g++ 12, on ARM 13, or clang "
            "16, or later), then zif-cpu again"
        )
    try:
        raw = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return f"the native kernels do not load: {error}; install zif-cpu again on this machine"
    try:
        abi = raw.zif_cpu_abi()
        if abi != ABI:
            return f"{str(found[0])!r} has version {abi} of the interface, zif-cpu calls {ABI}; install zif-cpu again"
        return Library(raw, _declare(raw))
    except AttributeError as error:
        return f"{str(found[0])!r} is not the library of zif-cpu: {error}; install zif-cpu again"


def _places() -> list[Path]:
    """Return where the library may lie: beside this file, or, of an editable install, where the installer put it."""
    if named := library_file():
        return [named]
    places = [Path(__file__).with_name(_FILE)]
    with suppress(PackageNotFoundError):
        places.append(Path(str(distribution("zif-cpu").locate_file(f"zif_cpu/{_FILE}"))))
    return places


def _declare(raw: ctypes.CDLL) -> tuple[str, ...]:
    """Declare what the functions take and return. Returns the instruction sets."""
    for name, arguments in _ARGUMENTS.items():
        function = getattr(raw, f"zif_cpu_{name}")
        function.argtypes, function.restype = arguments, None
    raw.zif_cpu_compact_weight.argtypes, raw.zif_cpu_compact_weight.restype = (_P,), _N
    raw.zif_cpu_experts.argtypes, raw.zif_cpu_experts.restype = (_P,), _N
    raw.zif_cpu_quantized_experts.argtypes, raw.zif_cpu_quantized_experts.restype = (_P,), _N
    raw.zif_cpu_use_isa.argtypes = (ctypes.c_char_p,)
    raw.zif_cpu_use_threads.argtypes = (_N,)
    raw.zif_cpu_isas.restype = ctypes.c_char_p
    return tuple(raw.zif_cpu_isas().decode().split())
