"""The form in which a block leaves the process: a header that says what it is, then the bytes.

    | magic and version | header length | header (JSON, padded with blanks) | the block's bytes |
    |      8 bytes      |    4 bytes    |     to a multiple of 64 bytes     |    block_bytes    |

The header is made of the model's fingerprint, group, layout, the block's name and a checksum of its bytes. Whoever
reads an entry knows all of this but the checksum, so the header that the bytes found would have had is compared as a
whole: another format version, model, layout or block, or a single wrong bit, is not what was saved.
"""

import hashlib
import json
from dataclasses import dataclass

from zif.contract import BlockBytes, KVLayout

MAGIC = b"zif.kv\x00\x01"
"""The last byte is the version of this form."""

_ALIGNMENT = 64
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class EntryFormat:
    """The form of one group's blocks. `fingerprint` is of all that decides the content of a block but its tokens."""

    fingerprint: bytes
    group: int
    layout: KVLayout

    @property
    def num_bytes(self) -> int:
        """Size of an entry, header included; the same for every block of the group."""
        return len(self._header(bytes(_DIGEST_BYTES), b"")) + self.layout.block_bytes

    def encode(self, name: bytes, data: BlockBytes) -> bytes:
        """Return the entry of a block named by a digest of 32 bytes."""
        assert len(name) == _DIGEST_BYTES, f"a block cannot be named {name!r}"
        assert len(data) == self.layout.block_bytes, f"a block of {self.layout.block_bytes} bytes has {len(data)}"
        return self._header(name, data) + data

    def decode(self, name: bytes, entry: bytes) -> bytes | None:
        """Return the block's bytes, or None unless they are exactly what was saved under this name."""
        data = entry[-self.layout.block_bytes :]
        return data if entry == self._header(name, data) + data else None

    def _header(self, name: bytes, data: BlockBytes) -> bytes:
        described = {
            "fingerprint": self.fingerprint.hex(),
            "group": self.group,
            "axes": self.layout.axes,
            "shape": self.layout.shape,
            "dtype": self.layout.dtype,
            "block_bytes": self.layout.block_bytes,
            "name": name.hex(),
            "checksum": hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest(),
        }
        text = json.dumps(described, sort_keys=True).encode()
        text += b" " * (-(len(MAGIC) + 4 + len(text)) % _ALIGNMENT)
        return MAGIC + len(text).to_bytes(4, "little") + text
