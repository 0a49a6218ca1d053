"""Faults of collectives between ranks (L6): sums, order, parts, messages, deadlines, groups that are lost."""

from zif_conformance.mutants.bank import Edit, Mutant


def _fault(name: str, broken: str, origin: str, before: str, after: str) -> Mutant:
    # Ranks are processes of their own.
    return Mutant(f"ranks-{name}", "L6", broken, origin, (Edit("collectives.py", before, after),), fresh=True)


_GATHER = 'return torch.cat(self._exchange("all_gather", array))'
_PART = "return array.chunk(self.group.world_size)[self.group.rank]"
_TO_ALL = 'return torch.cat([self._own_part(part) for part in self._exchange("all_to_all", array)])'
_BROADCAST = 'return self._exchange(f"broadcast from {source}", array)[source]'
_TOTAL = "    return total.to(dtype)"
_BYTES = "array.contiguous().reshape(-1).view(torch.uint8)"
_EXPIRED = "if time.monotonic() > deadline:"

_VALUES = (
    _fault(
        "last-rank-dropped",
        "Sums leave out the last of three or more ranks.",
        "last rank dropped",
        "for part in parts[1:]:",
        "for part in parts[1:2]:",
    ),
    _fault(
        "rank-0-counted-twice",
        "Sums count rank 0 twice.",
        "reductions that start from their own input",
        _TOTAL,
        "    total += parts[0]\n" + _TOTAL,
    ),
    _fault(
        "mean-for-sum",
        "Sums of floats are divided by the number of ranks.",
        "mean and sum behind one flag",
        _TOTAL,
        "    total = total / len(parts) if total.is_floating_point() else total\n" + _TOTAL,
    ),
    _fault(
        "nan-swallowed",
        "NaN and infinity become numbers in sums.",
        "sanitizing of intermediate values",
        _TOTAL,
        "    total = total.nan_to_num() if total.is_floating_point() else total\n" + _TOTAL,
    ),
    _fault(
        "sums-downcast",
        "Float32 is summed as bfloat16.",
        "compressed collectives that nobody asked for",
        _TOTAL,
        "    total = total.bfloat16() if dtype == torch.float32 else total\n" + _TOTAL,
    ),
    _fault(
        "tail-not-summed",
        "Arrays are summed in whole groups of eight elements; the rest is rank 0's.",
        "vector loads that drop the tail of an array",
        "        total += part\n",
        "        flat = total.view(-1)\n        whole = max(8, flat.numel() // 8 * 8)\n"
        "        flat[:whole] += part.reshape(-1)[:whole]\n",
    ),
    _fault(
        "gathered-in-reverse",
        "Gathered arrays come from the last rank to the first.",
        "rank order of gathers",
        _GATHER,
        'return torch.cat(self._exchange("all_gather", array)[::-1])',
    ),
    _fault(
        "gathered-from-itself-on",
        "Gathered arrays begin with the rank's own.",
        "rank order of ring algorithms",
        _GATHER,
        'parts = self._exchange("all_gather", array)\n'
        "        return torch.cat(parts[self.group.rank :] + parts[: self.group.rank])",
    ),
    _fault(
        "part-of-the-next-rank",
        "Scattered parts go to the rank before.",
        "off-by-one ranks",
        _PART,
        "return array.chunk(self.group.world_size)[(self.group.rank + 1) % self.group.world_size]",
    ),
    _fault(
        "to-all-keeps-its-own",
        "All-to-all gives a rank its own array back.",
        "experts that never leave their rank",
        _TO_ALL,
        'return self._exchange("all_to_all", array)[self.group.rank]',
    ),
    _fault(
        "broadcast-from-0",
        "Whatever the source, rank 0's array is broadcast.",
        "an option accepted and ignored",
        _BROADCAST,
        _BROADCAST.replace("[source]", "[0]"),
    ),
    _fault(
        "strides-ignored",
        "Arrays are read as if they were dense.",
        "wrong stride of a view",
        _BYTES,
        "torch.as_strided(array, (array.numel(),), (1,)).view(torch.uint8)",
    ),
    _fault(
        "empty-refused",
        "An array without elements is an error.",
        "ranks without tokens",
        " if data else torch.empty(shape, dtype=dtype)",
        "",
    ),
)

_ORDER = (
    _fault(
        "messages-without-number",
        "A message replaces the one before it that was not received yet.",
        "missing synchronization between sender and receiver",
        'return f"message/{pair}/{self._num_messages[pair]}"',
        'return f"message/{pair}"',
    ),
    _fault(
        "exchange-without-number",
        "A rank may read what another left for the collective before.",
        "buffers used again before all have read them",
        "number = self.group, self._num_exchanges",
        "number = self.group, self._num_exchanges % 2",
    ),
    _fault(
        "barrier-does-nothing",
        "A barrier does not wait.",
        "missing synchronization",
        'self._exchange("barrier", torch.zeros(1))',
        "return None",
    ),
    _fault(
        "axis-cut-in-silence",
        "A first axis that the ranks do not divide is cut unevenly.",
        "shape checks left to the library",
        "if array.shape[0] % self.group.world_size:",
        "if array.shape[0] < 0:",
    ),
    _fault(
        "negative-source-wraps",
        "A negative source counts from the end.",
        "signed indices",
        "if not 0 <= rank < self.group.world_size:",
        "if rank >= self.group.world_size:",
    ),
    _fault(
        "refusal-after-sending",
        "A refused collective counts as one that took place, and takes the group out of step.",
        "errors that leave ranks out of step",
        '        self._check_divisible("reduce_scatter", array)\n',
        '        self._num_exchanges += self.group.rank == 0\n        self._check_divisible("reduce_scatter", array)\n'
        "        self._num_exchanges -= self.group.rank == 0\n",
    ),
)

_LOST = (
    _fault(
        "deadline-doubled",
        "A rank waits ten times its deadline.",
        "time-outs of the library that hide the caller's",
        "deadline, nap = time.monotonic() + self.group.deadline_s, _FIRST_NAP_S",
        "deadline, nap = time.monotonic() + 10 * self.group.deadline_s, _FIRST_NAP_S",
    ),
    _fault(
        "lost-group-goes-on",
        "After a rank was lost, the group takes further work and waits again.",
        "groups that hang once more after an error",
        _EXPIRED,
        "if time.monotonic() > deadline and not self._unusable:\n"
        '                    raise self._error(operation, "late")\n                ' + "if False:",
    ),
    _fault(
        "loss-is-zeros",
        "The array of a rank that does not come is taken for the rank's own.",
        "errors that end as wrong numbers",
        'contents = [self._wait_for(operation, f"{number}/{rank}") for rank in range(group.world_size)]',
        "contents = []\n        for rank in range(group.world_size):\n            try:\n"
        '                contents.append(self._wait_for(operation, f"{number}/{rank}"))\n'
        "            except CommunicatorError:\n                contents.append(own)",
    ),
    _fault(
        "abort-ignored",
        "A group that was aborted goes on.",
        "aborts that do nothing",
        'self._unusable = self._unusable or "it was aborted"\n',
        "pass\n",
    ),
    _fault(
        "closed-group-works",
        "A closed group takes further work.",
        "use after close",
        'self._unusable = "it is closed"\n',
        "pass\n",
    ),
    _fault(
        "second-close-fails",
        "To close a group twice is an error.",
        "cleaning up after a failed start",
        '        if self._unusable:\n            return\n        self._put(f"left/',
        '        if self._unusable:\n            raise self._error("close", self._unusable)\n        self._put(f"left/',
    ),
    _fault(
        "one-rank-serves-nobody",
        "Over the network, no rank keeps the store that the others ask.",
        "ranks that wait for each other at the start",
        "is_server = group.rank == 0\n",
        "is_server = group.rank == group.world_size\n",
    ),
    _fault(
        "wrong-exception",
        "A loss is reported as an error of the library instead of the contract's.",
        "exceptions that callers do not know",
        '        return CommunicatorError(\n            f"{operation} on rank',
        '        return RuntimeError(\n            f"{operation} on rank',
    ),
)

MUTANTS = (*_VALUES, *_ORDER, *_LOST)
"""Every fault of collectives."""
