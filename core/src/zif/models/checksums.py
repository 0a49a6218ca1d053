"""Whether weight files are what was published, where that can be known.

The safetensors format has no checksum, so a bit that flipped in a weight looks like another weight. Two things tell: a
`SHA256SUMS` file beside the weights (the format of sha256sum), and the cache of the Hugging Face hub, where a file
links to a blob that is named by its SHA-256. Without either there is nothing to compare. Used by loading.
"""

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from zif.errors import CheckpointError

SUMS_FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_BLOB = re.compile(r"[0-9a-f]{64}")

_CHUNK_BYTES = 1 << 20
_MAX_THREADS = 8


def verify_files(files: Iterable[Path]) -> None:
    """Raise `CheckpointError`, naming the file, when one has another SHA-256 than was published for it."""
    with verifying(files):
        pass


@contextlib.contextmanager
def verifying(files: Iterable[Path]) -> Iterator[None]:
    """Verify files as `verify_files` does, beside what the context does with them, and raise at its end.

    A `CheckpointError` of the context gives way to this one, which says more; others end the verification.
    """
    published = [(file, expected) for file in sorted(files) if (expected := _published_sum(file))]
    given_up = threading.Event()
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), "zif-verify") as threads:
        try:
            checks = [threads.submit(_verify, file, expected, given_up) for file, expected in published]
            try:
                yield
            except CheckpointError:
                _raise_first(checks)
                raise
            _raise_first(checks)
        finally:
            given_up.set()


def _raise_first(checks: Iterable[Future[None]]) -> None:
    for check in checks:
        check.result()


def _verify(file: Path, expected: str, given_up: threading.Event) -> None:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                if given_up.is_set():
                    return
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(file)!r}: {error}; check the disk") from error
    if digest.hexdigest() != expected:
        raise CheckpointError(
            f"{str(file)!r} is corrupt: its SHA-256 is {digest.hexdigest()}, published was {expected}; "
            "download it again"
        )


def _published_sum(file: Path) -> str | None:
    sums = file.parent / SUMS_FILE
    if sums.is_file():
        return _read_sums(sums).get(file.name)
    if file.is_symlink() and _BLOB.fullmatch(file.resolve().name):
        return file.resolve().name
    return None


def _read_sums(path: Path) -> dict[str, str]:
    matches = [_LINE.fullmatch(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if None in matches:
        raise CheckpointError(f"{str(path)!r} is no list of SHA-256 sums; write it with: sha256sum *.safetensors")
    return {match[2]: match[1].lower() for match in matches if match}
