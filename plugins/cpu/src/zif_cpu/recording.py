"""A forward pass seen as it runs: which native calls it makes, in order, and what torch computes between them.

While a `Recorder` is active, torch takes the memory of results from a slab whose addresses stay valid, and hands each
of its operations to the recorder. Native calls say themselves what they are. `zif_cpu.programs` repeats the record.
"""

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SLAB_BYTES = 512 << 20
"""Address space for the results of one pass; the system gives memory only to what is touched."""

_ALIGNMENT = 64

_aten = torch.ops.aten
_UNREPEATABLE = frozenset((torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output))
_PRODUCTS = frozenset((_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.linear, _aten.matmul))
_EMPTY = frozenset((_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default))


class NotRecordableError(Exception):
    """The pass does something that cannot be repeated by calling the same functions again. Never leaves the package."""


class Slab:
    """Memory for results: a piece is free again when no array refers to it. Passes overlap each other."""

    def __init__(self, num_bytes: int = SLAB_BYTES) -> None:
        self._memory = np.empty(num_bytes, np.uint8)
        self._start = -self._memory.ctypes.data % _ALIGNMENT
        self._free: list[tuple[int, int]] = []
        self.begin()

    def begin(self, num_tokens: int = 0, room: int = 0) -> None:
        """Start a pass: all is free. What earlier passes hold is theirs while they run.

        Arrays of `num_tokens` rows get memory for `room`: passes of other numbers of tokens then put theirs at the same
        places.
        """
        self._free = [(self._start, len(self._memory))]
        self._pass = object()
        self._num_tokens, self._room = num_tokens, room

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an array of undefined content. Raises `NotRecordableError` when the slab has no room."""
        count = 1
        for extent in shape:
            count *= extent
        num_bytes = reserved = count * dtype.itemsize
        if self._num_tokens and shape and shape[0] == self._num_tokens:
            reserved = num_bytes // self._num_tokens * self._room
        reserved = max(_ALIGNMENT, -(-reserved // _ALIGNMENT) * _ALIGNMENT)
        begin = self._take(reserved)
        piece = self._memory[begin : begin + num_bytes]
        # The array keeps the piece, and the piece tells when nobody keeps it.
        array = torch.from_numpy(piece)
        weakref.finalize(piece, self._give_back, self._pass, begin, begin + reserved)
        return array.view(dtype).view(tuple(shape))

    def _take(self, num_bytes: int) -> int:
        for place, (begin, end) in enumerate(self._free):
            if end - begin >= num_bytes:
                self._free[place] = (begin + num_bytes, end)
                return begin
        raise NotRecordableError(f"the pass needs more than {len(self._memory) >> 20} MiB for its results")

    def _give_back(self, owner: object, begin: int, end: int) -> None:
        if owner is not self._pass:
            return
        spans = sorted([*self._free, (begin, end)])
        merged = [spans[0]]
        for start, stop in spans[1:]:
            if start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self._free = [span for span in merged if span[1] > span[0]]


@dataclass(slots=True)
class StepCalls:
    """The calls of one kind that one layer group makes: `calls` differ in the fields of layers, the rest is the step's.

    kind: the struct. layer_fields: names of the fields that differ.
    """

    kind: type[ctypes.Structure]
    layer_fields: tuple[str, ...]
    calls: list[bytes] = field(default_factory=list)

    def rows(self) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """Return a copy of the structs, [calls, bytes]."""
        return np.frombuffer(b"".join(self.calls), np.uint8).reshape(len(self.calls), -1).copy()

    def is_shared(self) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Return which bytes of the struct are the step's."""
        shared = np.ones(ctypes.sizeof(self.kind), np.bool_)
        for name in self.layer_fields:
            place = getattr(self.kind, name)
            shared[place.offset : place.offset + place.size] = False
        return shared


@dataclass(frozen=True, slots=True)
class NativeCall:
    """One call: the address of a function and its struct, or where in `StepCalls` the struct is."""

    function: int
    struct: bytes | None
    group: tuple[int, type[ctypes.Structure]] | None = None
    index: int = 0


@dataclass(frozen=True, slots=True)
class TorchCall:
    """One operation of torch. results: the arrays that get what it gives; none where it changes its arguments."""

    function: Any
    arguments: Sequence[Any]
    named: Mapping[str, Any]
    results: Sequence[torch.Tensor]

    def __call__(self) -> None:
        given = self.function(*self.arguments, **self.named)
        if self.results:
            for result, one in zip(self.results, _arrays(given), strict=True):
                result.copy_(one)


Item = NativeCall | Callable[[], None]
"""One call of a pass: a native one, one of torch, or another that nothing is known of."""


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Look at a pass that runs as it is. found: whether torch multiplies matrices in it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As `Recorder` has it."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.found |= func.overloadpacket in _PRODUCTS
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record one pass. `items` are its calls in order, `steps` those whose structs change from step to step.

    num_tokens, room: as `Slab.begin` has them. Given where passes of several numbers of tokens share a program: then
    what torch computes lies in the slab, too, and nobody may keep it beyond the pass.
    """

    def __init__(self, slab: Slab, num_tokens: int = 0, room: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        slab.begin(num_tokens, room)
        self._slab = slab
        self._shares = room > 0
        self.items: list[Item] = []
        self.steps: dict[tuple[int, type[ctypes.Structure]], StepCalls] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell torch to leave `__torch_dispatch__` alone: to wrap it, it imports its compiler, which takes 1.3 s."""
        return False

    def call(self, function: int, struct: bytes) -> None:
        """Record a native call whose struct is the same every time."""
        self.items.append(NativeCall(function, struct))

    def heard(self, function: Any) -> Callable[[Any], Any]:
        """Return what calls `function`, of a struct as bytes or by reference, and records the call."""

        def call(struct: Any) -> Any:
            if isinstance(struct, bytes):
                self.call(address_of(function), struct)
            else:
                self.items.append(lambda: function(struct))
            return function(struct)

        return call

    def step_call(self, function: int, struct: ctypes.Structure, group: int, layer_fields: tuple[str, ...]) -> None:
        """Record a native call of layer group `group`; but for `layer_fields` its struct is that of the step."""
        key = (group, type(struct))
        calls = self.steps.setdefault(key, StepCalls(type(struct), layer_fields)).calls
        calls.append(bytes(struct))
        self.items.append(NativeCall(function, None, key, len(calls) - 1))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func in _EMPTY:
            return self._slab.empty(*_described(func, args, options))
        if _depends_on_values(func, args):
            raise NotRecordableError(f"what {func} gives depends on more than shapes")
        result = func(*args, **options)
        if func._schema.is_mutable:
            self.items.append(TorchCall(func, args, options, ()))
            return result
        outputs = _arrays(result)
        if not outputs:
            raise NotRecordableError(f"{func} gives something else than arrays")
        # Operations that may give a view, as `to` and `reshape`, are views only where they share memory.
        given = {array.untyped_storage().data_ptr() for array in _arrays((*args, *options.values()))}
        if not given.isdisjoint(output.untyped_storage().data_ptr() for output in outputs):
            return result
        if self._shares and isinstance(result, torch.Tensor):
            outputs = [result := self._moved(result)]
        self.items.append(TorchCall(func, args, options, outputs))
        return result

    def _moved(self, array: torch.Tensor) -> torch.Tensor:
        """Return a dense array as one of the slab."""
        if not array.is_contiguous() or not array.numel():
            return array
        return self._slab.empty(array.shape, array.dtype).copy_(array)


def _described(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Sequence[int], torch.dtype]:
    """Return shape and dtype of the array that is asked for."""
    if options.get("pin_memory") or str(options.get("device") or "cpu") != "cpu":
        raise NotRecordableError(f"{func} asks for another kind of memory: {options!r}")
    if func is _aten.empty.memory_format:
        return args[0], options.get("dtype") or torch.get_default_dtype()
    like: torch.Tensor = args[0]
    if like.device.type != "cpu":
        raise NotRecordableError(f"{func} of an array on {like.device}")
    return like.shape if func is _aten.empty_like.default else args[1], options.get("dtype") or like.dtype


def _depends_on_values(func: Any, args: tuple[Any, ...]) -> bool:
    if func is _aten.index.Tensor:  # whose shape is known unless an index is a mask
        return any(index.dtype in (torch.bool, torch.uint8) for index in _arrays(args[1]))
    return not _UNREPEATABLE.isdisjoint(func.tags)


def _arrays(value: Any) -> list[torch.Tensor]:
    """Return the arrays in a value, through sequences."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [array for one in value for array in _arrays(one)] if isinstance(value, list | tuple) else []


def address_of(function: Any) -> int:
    """Return the address of a function of a loaded library."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None, f"{function!r} has no address"
    return address
