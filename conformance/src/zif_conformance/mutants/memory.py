"""Faults of the device and its memory (L1): ledger, limit, alignment, zeroes, freeing, opening, health."""

from zif_conformance.mutants.bank import Edit, Mutant


def _fault(name: str, broken: str, origin: str, *changes: str, file: str = "memory.py") -> Mutant:
    edits = tuple(Edit(file, *pair) for pair in zip(changes[::2], changes[1::2], strict=True))
    return Mutant(f"memory-{name}", "L1", broken, origin, edits)


_LIMIT = "super().__init__(limit_bytes)"
_ZEROS = "memory = torch.zeros(num_bytes + alignment - 1, dtype=torch.uint8)"
_FIRST = "first = -memory.data_ptr() % alignment"
_LENT = "return memory[first : first + num_bytes]"
_FREE = "def _free(self, buffer: Buffer[torch.Tensor]) -> None:"
_CLOSED = "self.allocator.free_tag(tag)"
_JOIN = "thread.join(deadline_s)"


def _method(source: str) -> str:
    """Return edits' text that puts a method of the ledger before `_free`."""
    return f"{source}\n\n    {_FREE}"


MUTANTS = (
    _fault(
        "limit-one-too-many",
        "One byte beyond the limit is lent.",
        "limits off by one",
        _LIMIT,
        "super().__init__(limit_bytes + 1)",
    ),
    _fault(
        "limit-one-too-few",
        "The last byte of the limit is never lent.",
        "limits off by one",
        _LIMIT,
        "super().__init__(limit_bytes - 1)",
    ),
    _fault(
        "limit-ignored",
        "There is no limit.",
        "memory limits that are accepted and ignored",
        _LIMIT,
        "super().__init__(1 << 62)",
    ),
    _fault(
        "limit-doubled",
        "The device lends twice what its plan has.",
        "memory limits that are accepted and ignored",
        "TorchAllocator(plan.memory.available_bytes,",
        "TorchAllocator(2 * plan.memory.available_bytes,",
        file="device.py",
    ),
    _fault(
        "misaligned",
        "Memory begins where the host's allocator put it.",
        "alignment asked for and ignored",
        _FIRST,
        "first = 0",
    ),
    _fault(
        "misaligned-by-one",
        "Memory begins one byte behind the border.",
        "alignment off by one",
        _FIRST,
        "first = max(0, alignment - 1 - 0)",
    ),
    _fault(
        "aligned-to-64-only",
        "Alignments above 64 are served as 64.",
        "alignment asked for and ignored",
        _FIRST,
        "first = -memory.data_ptr() % min(alignment, 64)",
    ),
    _fault(
        "not-zeroed",
        "Memory comes back with what was in it.",
        "uninitialised memory that was zero in tests",
        _ZEROS,
        "memory = torch.full((num_bytes + alignment - 1,), 0xCD, dtype=torch.uint8)",
    ),
    _fault(
        "tail-not-zeroed",
        "Memory is zeroed in words of eight bytes, and the rest is not.",
        "uninitialised memory that was zero in tests",
        _LENT,
        "out = memory[first : first + num_bytes]\n        out[num_bytes // 8 * 8 :] = 0xCD\n        return out",
    ),
    _fault(
        "one-byte-short",
        "A buffer has one byte less than was asked for.",
        "sizes rounded down",
        _LENT,
        "return memory[first : first + num_bytes - 1 or 1]",
    ),
    _fault(
        "rounded-up",
        "A buffer has its size rounded up to 64.",
        "sizes rounded up",
        _LENT,
        "return torch.zeros(-(-num_bytes // 64) * 64, dtype=torch.uint8)",
    ),
    _fault("int8-array", "A buffer is an array of int8.", "dtype of raw memory", _LENT, _LENT + ".view(torch.int8)"),
    _fault(
        "memory-shared",
        "Buffers of equal size share their memory.",
        "a cache of freed memory that lends it twice",
        _LENT,
        "kept = self.__dict__.setdefault('kept', {})\n"
        "        out = kept.setdefault((num_bytes, alignment), memory[first : first + num_bytes])\n        return out",
    ),
    _fault(
        "freed-memory-reused",
        "Freed memory is lent again though a view still refers to it.",
        "use after free",
        _FREE,
        "def free(self, buffer: Buffer[torch.Tensor]) -> None:\n"
        "        super().free(buffer)\n"
        "        self.__dict__.setdefault('pool', {}).setdefault(buffer.num_bytes, []).append(buffer.array)\n\n    "
        + _FREE,
        _LENT,
        "pool = self.__dict__.get('pool', {}).get(num_bytes)\n        if pool and alignment == 64:\n"
        "            return pool.pop().zero_()\n        " + _LENT,
    ),
    _fault(
        "free-twice-accepted",
        "A buffer may be given back twice.",
        "double free",
        _FREE,
        _method(
            "def free(self, buffer: Buffer[torch.Tensor]) -> None:\n"
            "        if buffer.buffer_id in self._live:\n            super().free(buffer)"
        ),
    ),
    _fault(
        "free-twice-counted",
        "A second free of a buffer is counted once more.",
        "double free",
        _FREE,
        _method(
            "def free(self, buffer: Buffer[torch.Tensor]) -> None:\n"
            "        self._live.setdefault(buffer.buffer_id, buffer)\n        super().free(buffer)"
        ),
    ),
    _fault(
        "foreign-buffer-accepted",
        "A buffer of another allocator is taken back in the place of the own one of the same number.",
        "handles without an owner",
        _FREE,
        _method(
            "def free(self, buffer: Buffer[torch.Tensor]) -> None:\n"
            "        super().free(self._live.get(buffer.buffer_id, buffer))"
        ),
    ),
    _fault(
        "free-leaks",
        "Freed bytes stay in the count that the limit is held against.",
        "a leaked block per preemption",
        _FREE,
        _method(
            "def free(self, buffer: Buffer[torch.Tensor]) -> None:\n"
            "        super().free(buffer)\n        self._allocated_bytes += buffer.num_bytes // 64"
        ),
    ),
    _fault(
        "out-of-memory-poisons",
        "After an allocation that was refused, all are.",
        "allocators unusable after running out of memory",
        _FREE,
        _method(
            "def allocate(self, num_bytes: int, tag: str, alignment: int = 64) -> Buffer[torch.Tensor]:\n"
            "        if self.__dict__.get('poisoned'):\n"
            "            raise OutOfMemoryError(f'{num_bytes} bytes: broken')\n"
            "        try:\n            return super().allocate(num_bytes, tag, alignment)\n"
            "        except OutOfMemoryError:\n            self.__dict__['poisoned'] = True\n            raise"
        ),
    ),
    _fault(
        "out-of-memory-counted",
        "A refused allocation is counted as held.",
        "statistics updated before the allocation",
        _FREE,
        _method(
            "def allocate(self, num_bytes: int, tag: str, alignment: int = 64) -> Buffer[torch.Tensor]:\n"
            "        try:\n            return super().allocate(num_bytes, tag, alignment)\n"
            "        except OutOfMemoryError:\n            self._peak_bytes += num_bytes\n            raise"
        ),
    ),
    _fault(
        "out-of-memory-is-none",
        "A refused allocation returns a smaller buffer instead of raising.",
        "sizes cut to what is there",
        _FREE,
        _method(
            "def allocate(self, num_bytes: int, tag: str, alignment: int = 64) -> Buffer[torch.Tensor]:\n"
            "        left = max(1, self._limit_bytes - self._allocated_bytes)\n"
            "        return super().allocate(min(num_bytes, left), tag, alignment)"
        ),
    ),
    _fault(
        "bad-alignment-accepted",
        "An alignment that is no power of two is rounded instead of refused.",
        "arguments repaired in silence",
        _FREE,
        _method(
            "def allocate(self, num_bytes: int, tag: str, alignment: int = 64) -> Buffer[torch.Tensor]:\n"
            "        return super().allocate(num_bytes, tag, 1 << max(0, alignment).bit_length())"
        ),
    ),
    _fault(
        "empty-size-accepted",
        "A size of 0 gives a buffer of one byte.",
        "arguments repaired in silence",
        _FREE,
        _method(
            "def allocate(self, num_bytes: int, tag: str, alignment: int = 64) -> Buffer[torch.Tensor]:\n"
            "        return super().allocate(max(1, num_bytes), tag, alignment)"
        ),
    ),
    _fault(
        "stats-are-zero",
        "The ledger is empty whatever is held.",
        "statistics that had returned 0 for a live allocation",
        _FREE,
        _method(
            "def stats(self):  # type: ignore[no-untyped-def]\n        from zif.contract import MemoryStats\n\n"
            "        return MemoryStats(self._limit_bytes, (), self._peak_bytes)"
        ),
    ),
    _fault(
        "stats-merge-tags",
        "All bytes are counted under one tag.",
        "statistics without tags",
        _FREE,
        _method(
            "def stats(self):  # type: ignore[no-untyped-def]\n        from zif.contract import MemoryStats\n\n"
            "        held = (('all', self._allocated_bytes),) if self._allocated_bytes else ()\n"
            "        return MemoryStats(self._limit_bytes, held, self._peak_bytes)"
        ),
    ),
    _fault(
        "peak-is-current",
        "The peak is what is held now.",
        "a peak that falls",
        _FREE,
        _method(
            "def stats(self):  # type: ignore[no-untyped-def]\n        self._peak_bytes = self._allocated_bytes\n"
            "        return super().stats()"
        ),
    ),
    _fault(
        "free-tag-takes-all",
        "Giving back one tag gives back those that begin with it.",
        "prefixes taken for names",
        _FREE,
        _method(
            "def free_tag(self, tag: str) -> None:\n"
            "        for buffer in [b for b in self._live.values() if b.tag.startswith(tag)]:\n"
            "            self.free(buffer)"
        ),
    ),
    _fault(
        "free-tag-takes-one",
        "Giving back a tag gives back its first buffer only.",
        "a leaked block per preemption",
        _FREE,
        _method(
            "def free_tag(self, tag: str) -> None:\n"
            "        for buffer in [b for b in self._live.values() if b.tag == tag][:1]:\n            self.free(buffer)"
        ),
    ),
    _fault(
        "close-leaks",
        "Closing a device gives nothing back.",
        "memory that outlives its device",
        _CLOSED,
        "pass",
        file="device.py",
    ),
    _fault(
        "close-twice-raises",
        "A second close raises.",
        "cleanup that runs twice",
        "if self._closed:\n            return\n        self._closed = True",
        "assert not self._closed\n        self._closed = True",
        file="device.py",
    ),
    _fault(
        "healthy-when-closed",
        "A closed device says that it is healthy.",
        "health checks that check nothing",
        'return Health(False, f"device {self._device_id!r} is closed")',
        'return Health(True, "ok")',
        file="device.py",
    ),
    _fault(
        "health-always-bad",
        "A sound device says that it is not healthy.",
        "health checks with a wrong expectation",
        "right = torch.equal(product, left.flip(1))",
        "right = torch.equal(product, left.flip(0))",
        file="device.py",
    ),
    _fault(
        "health-without-deadline",
        "Health takes at least three seconds, whatever its deadline.",
        "deadlines accepted and ignored",
        _JOIN,
        "threading.Event().wait(3.0)\n        " + _JOIN,
        file="device.py",
    ),
    _fault(
        "health-raises-when-late",
        "Health raises when it has no answer in time.",
        "health checks that raise",
        'return answers[0] if answers else Health(False, f"no answer within {deadline_s} s")',
        "return answers.pop(0) if deadline_s >= 1 else [][0]",
        file="device.py",
    ),
    _fault(
        "rank-wraps",
        "A negative rank counts from the end.",
        "signed indices",
        "if not 0 <= rank < settings.num_devices:",
        "if rank >= settings.num_devices:",
        file="platform.py",
    ),
    _fault(
        "opens-another-plan",
        "The device says that it runs another plan than the one it was opened for.",
        "state shared between devices",
        "self.plan = plan\n",
        "self.plan = __import__('dataclasses').replace(plan, notes=('another',))\n",
        file="device.py",
    ),
)
"""Every fault of memory and devices."""
