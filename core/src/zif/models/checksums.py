"""Whether weight files are what was published, where that can be known.

The safetensors format has no checksum, so a bit that flipped in a weight looks like another weight. Two things tell: a
`SHA256SUMS` file beside the weights (the format of sha256sum), and the cache of the Hugging Face hub, where a file
links to a blob that is named by its SHA-256. Without either there is nothing to compare. Used by loading.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from zif.errors import CheckpointError

SUMS_FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_BLOB = re.compile(r"[0-9a-f]{64}")


def verify_files(files: Iterable[Path]) -> None:
    """Raise `CheckpointError`, naming the file, when one has another SHA-256 than was published for it."""
    for file in files:
        expected = _published_sum(file)
        if expected is None:
            continue
        with file.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != expected:
            raise CheckpointError(
                f"{str(file)!r} is corrupt: its SHA-256 is {actual}, published was {expected}; download it again"
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
