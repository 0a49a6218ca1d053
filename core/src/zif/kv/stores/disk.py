"""Copies of blocks in files: they survive the process, and are trusted only as far as their checksum goes.

    folder / <fingerprint of the model> / <group>-<name of the block>.kv

A file is written under a temporary name and then renamed, so several engines may share a folder: each finds whole files
or none, and a file that another one removed is a lost copy. What fails is never an error of the engine: a full or
unwritable disk loses the copies, with one warning.

The bound covers all such files in the folder, of whatever model, headers included. Beyond it the oldest go at the
start; later the control plane keeps what it knows within the bound, and files of other models or with damage go, oldest
first, as soon as there is no room beside them. What other engines write meanwhile is found at the next start.
"""

import contextlib
import logging
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zif.contract import BlockBytes, KeptBlock
from zif.kv.stores.entries import EntryFormat
from zif.kv.stores.memory import HeldBlock

logger = logging.getLogger(__name__)

_ENTRY = re.compile(r"([0-9]{1,4})-([0-9a-f]{64})\.kv")
_UNFINISHED = re.compile(rf"\.{_ENTRY.pattern}(\.[0-9]+){{2}}")
_FOLDER = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class _File:
    """A file in the folder, as the scan at start saw it."""

    modified_ns: int
    path: Path
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Entry:
    group: int
    name: bytes


class DiskStore:
    """Keep named blocks in at most `max_bytes` of files. `formats` has one entry per layer group."""

    def __init__(self, folder: Path, max_bytes: int, formats: Sequence[EntryFormat]) -> None:
        self._folder = folder / formats[0].fingerprint.hex()
        self._max_bytes = max_bytes
        self._formats = formats
        self._entry_bytes = [form.num_bytes for form in formats]
        self._num_bytes = 0
        self._entries: dict[int, _Entry] = {}
        self._foreign: deque[_File] = deque()
        self._warned = False
        self._scan(folder)

    def __contains__(self, handle: int) -> bool:
        return handle in self._entries

    def kept(self) -> list[KeptBlock]:
        """Return what is there to be found, oldest first."""
        return [
            KeptBlock(handle, entry.group, entry.name, self._entry_bytes[entry.group])
            for handle, entry in self._entries.items()
        ]

    def put(self, handle: int, group: int, name: bytes, data: BlockBytes) -> None:
        """Write a block. When that fails, it is lost."""
        entry, path = _Entry(group, name), self._path(group, name)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{handle}")
        content = self._formats[group].encode(name, data)
        self._make_room(len(content))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            self._warn(error)
            self._remove(temporary)
            return
        self._entries[handle] = entry
        self._num_bytes += len(content)

    def get(self, handle: int) -> bytes | None:
        """Read a block. One that is gone or not what was written is forgotten, file and all."""
        entry = self._entries.get(handle)
        if entry is None:
            return None
        path = self._path(entry.group, entry.name)
        try:
            data = self._formats[entry.group].decode(entry.name, path.read_bytes())
            os.utime(path)  # The next start removes the oldest first.
        except OSError:
            data = None
        if data is None:
            logger.warning("KV block %s is gone or damaged; it is computed again", path)
            self.drop(handle)
        else:
            self._entries[handle] = self._entries.pop(handle)
        return data

    def drop(self, handle: int) -> None:
        """Remove what is kept under `handle`, if anything."""
        entry = self._entries.pop(handle, None)
        if entry is not None:
            self._num_bytes -= self._entry_bytes[entry.group]
            self._remove(self._path(entry.group, entry.name))

    def pop(self, handle: int) -> HeldBlock | None:
        """Give up what is kept under `handle`, if it is still there."""
        entry = self._entries.get(handle)
        data = self.get(handle)
        self.drop(handle)
        return HeldBlock(entry.group, entry.name, data) if entry and data is not None else None

    def put_newest(self, blocks: Mapping[int, HeldBlock]) -> None:
        """Write the last of `blocks` that fit, removing what was used longest ago."""
        total, chosen = 0, []
        for handle, block in reversed([*blocks.items()]):
            total += self._entry_bytes[block.group]
            if total > self._max_bytes:
                break
            chosen.append((handle, block))
        for handle, block in reversed(chosen):
            self._make_room(self._entry_bytes[block.group])
            while self._num_bytes + self._entry_bytes[block.group] > self._max_bytes:
                self.drop(next(iter(self._entries)))
            self.put(handle, block.group, block.name, block.data)

    def _path(self, group: int, name: bytes) -> Path:
        return self._folder / f"{group}-{name.hex()}.kv"

    def _scan(self, folder: Path) -> None:
        """Take stock: remove the oldest files beyond the bound, number this model's entries."""
        try:
            files = sorted(_files(folder), key=lambda file: (file.modified_ns, file.path))
        except OSError as error:
            self._warn(error)
            return
        excess = sum(file.num_bytes for file in files) - self._max_bytes
        for file in files:
            if excess > 0:
                excess -= file.num_bytes
                self._remove(file.path)
            elif (entry := self._entry_of(file)) is not None:
                self._entries[len(self._entries) + 1] = entry
                self._num_bytes += file.num_bytes
            else:
                self._num_bytes += file.num_bytes
                self._foreign.append(file)

    def _entry_of(self, file: _File) -> _Entry | None:
        match = _ENTRY.fullmatch(file.path.name)
        if match is None or file.path.parent != self._folder or int(match[1]) >= len(self._formats):
            return None
        group = int(match[1])
        return _Entry(group, bytes.fromhex(match[2])) if file.num_bytes == self._entry_bytes[group] else None

    def _make_room(self, num_bytes: int) -> None:
        """Remove files that this engine does not know, as far as need be."""
        while self._foreign and self._num_bytes + num_bytes > self._max_bytes:
            file = self._foreign.popleft()
            self._num_bytes -= file.num_bytes
            self._remove(file.path)

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("KV blocks cannot be kept on disk (%s); zif goes on without what is lost", error)


def _files(folder: Path) -> Iterator[_File]:
    """Go through the files that some engine left; what else lies in the folder is nobody's business here."""
    for inner in filter(Path.is_dir, folder.glob("*")):
        for path in inner.iterdir() if _FOLDER.fullmatch(inner.name) else ():
            if _ENTRY.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # Another engine may just have removed it.
                    status = path.stat()
                    yield _File(status.st_mtime_ns, path, status.st_size)
