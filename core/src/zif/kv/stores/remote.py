"""Copies of blocks in a place that other engines share: names, checksums and patience around a `RemoteTier`.

A remote that raises `OSError` or returns what nobody put is left alone for a while: no request waits for it twice in
that time. What it said to have and had not is not asked for again. Control plane and data plane use the same object,
so a request that starts over because a copy was lost does not find the same copy.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence

from zif.contract import BlockBytes, RemoteTier
from zif.kv.stores.entries import EntryFormat

LOOKUP_TIMEOUT_S = 0.1
"""A look-up happens while a step is planned."""
COPY_TIMEOUT_S = 1.0
PAUSE_S = 10.0
"""How long a remote that failed is left alone."""
MAX_REMEMBERED_MISSES = 1 << 16

logger = logging.getLogger(__name__)


class RemoteStore:
    """Find, put and get blocks by group and name. `formats` has one entry per layer group."""

    def __init__(
        self, tier: RemoteTier, formats: Sequence[EntryFormat], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tier = tier
        self._formats = formats
        self._clock = clock
        self._paused_until_s: float | None = None
        self._warned = False
        self._missed: dict[bytes, None] = {}

    def contains(self, group: int, names: Sequence[bytes]) -> Sequence[bool]:
        """Say for each block of a group whether it can be had."""
        nowhere = [False] * len(names)
        if not names or self._is_paused():
            return nowhere
        try:
            remote_names = [self._remote_name(group, name) for name in names]
            found = self._tier.contains(remote_names, LOOKUP_TIMEOUT_S)
        except OSError as error:
            self._pause(error)
            return nowhere
        return [there and name not in self._missed for there, name in zip(found, remote_names, strict=True)]

    def put(self, group: int, name: bytes, data: BlockBytes) -> None:
        """Keep a block there, if that can be done now."""
        if self._is_paused():
            return
        self._missed.pop(self._remote_name(group, name), None)
        try:
            self._tier.put(self._remote_name(group, name), self._formats[group].encode(name, data), COPY_TIMEOUT_S)
        except OSError as error:
            self._pause(error)

    def get(self, group: int, name: bytes) -> bytes | None:
        """Return a block, or None unless it is there and what was put."""
        if self._is_paused():
            return None
        remote_name = self._remote_name(group, name)
        try:
            entry = self._tier.get(remote_name, COPY_TIMEOUT_S)
        except OSError as error:
            self._pause(error)
            return None
        data = None if entry is None else self._formats[group].decode(name, entry)
        if data is None:
            self._miss(remote_name)
        if data is None and entry is not None:
            self._pause(f"it returned other bytes than were put under {remote_name.hex()}")
        return data

    def _remote_name(self, group: int, name: bytes) -> bytes:
        """Tell apart what different models and groups call by the same name."""
        parts = self._formats[group].fingerprint + group.to_bytes(4, "little") + name
        return hashlib.blake2b(parts, digest_size=32).digest()

    def _is_paused(self) -> bool:
        return self._paused_until_s is not None and self._clock() < self._paused_until_s

    def _miss(self, remote_name: bytes) -> None:
        self._missed[remote_name] = None
        if len(self._missed) > MAX_REMEMBERED_MISSES:
            del self._missed[next(iter(self._missed))]

    def _pause(self, error: OSError | str) -> None:
        self._paused_until_s = self._clock() + PAUSE_S
        if not self._warned:
            self._warned = True
            logger.warning("the remote KV tier failed (%r); it is tried again every %g s", error, PAUSE_S)
