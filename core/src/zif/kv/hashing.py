"""Chained hashes that name the content of KV blocks.

A block's KV depends on every token up to its end and on what else conditioned the computation. So block i is named by
SHA-256 over its parent's digest and its tokens; block 0's parent is the root, which spells out salt, adapter and media:

    root(salt, adapter, media) -> block 0 -> block 1 -> ...

The bytes are canonical (fixed-width little-endian tokens, length-prefixed texts), so digests agree between processes,
machines and languages.
"""

import hashlib
import operator
import struct
import sys
from array import array
from collections.abc import Sequence

from zif.contract import CacheKey, Request

_VERSION = b"zif.kv.1"
_TOKEN = next(code for code in "IL" if array(code).itemsize == 4)


def canonical_tokens(token_ids: Sequence[int]) -> bytes:
    """Encode tokens as 4-byte little-endian integers."""
    tokens = array(_TOKEN, token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tobytes()


def root_content(key: CacheKey, block_size: int) -> bytes:
    """Spell out what conditions every block of a request, and the block size that cuts its tokens."""
    texts = [text.encode() for text in (key.salt, key.adapter, *key.media)]
    numbers = (block_size, *(len(text) for text in texts))
    return _VERSION + canonical_tokens(numbers) + b"".join(texts)


def is_root(before: bytes) -> bool:
    """Say whether what stands before a block's tokens in its content is a root, and not the digest of a parent.

    A digest that begins like a root is as improbable as a collision of 64 bits.
    """
    return before.startswith(_VERSION)


def digest_of(content: bytes) -> bytes:
    """Return the digest that names a block with this content."""
    return hashlib.sha256(content).digest()


class PrefixChain:
    """The digests of one request at one block size, extended as its tokens become known.

    The list lives on the request, so that nothing is hashed twice, not even after preemption.
    Its first entry is the root.
    """

    def __init__(self, request: Request, block_size: int) -> None:
        self._token_ids = request.token_ids
        self._block_size = block_size
        self._digests = request.digests.setdefault(block_size, [])
        if not self._digests:
            self._digests.append(root_content(request.cache_key, block_size))

    @property
    def num_hashed(self) -> int:
        """Count the blocks whose digests are known."""
        return len(self._digests) - 1

    def extend(self, num_blocks: int) -> None:
        """Hash up to the first `num_blocks` blocks, all of whose tokens are known."""
        if len(self._digests) <= num_blocks:
            self.contents(self.num_hashed, num_blocks)

    def digest(self, block: int) -> bytes:
        """Return the digest of a hashed block."""
        return self._digests[block + 1]

    def digests(self, first: int, end: int) -> list[bytes]:
        """Return the digests of the hashed blocks from `first` on, before `end`."""
        return self._digests[first + 1 : end + 1]

    def content(self, block: int) -> bytes:
        """Return the canonical bytes of `block`, what its digest is the hash of; its parent must be hashed."""
        start = block * self._block_size
        return self._digests[block] + canonical_tokens(self._token_ids[start : start + self._block_size])

    def contents(self, first: int, end: int) -> list[bytes]:
        """Return the canonical bytes of the blocks from `first` on, before `end`, and hash those that are new."""
        digests, sha256 = self._digests, hashlib.sha256
        if len(digests) == end == first + 1:  # The usual case: a generating request has filled one more block.
            content = self.content(first)
            digests.append(sha256(content).digest())
            return [content]
        first_new = max(first, len(digests) - 1)
        self.extend(first)
        tokens = self._tokens(first, end)
        contents = [*map(operator.add, digests[first:end], tokens[: first_new - first])]
        for block_tokens in tokens[first_new - first :]:
            content = digests[-1] + block_tokens
            contents.append(content)
            digests.append(sha256(content).digest())
        return contents

    def _tokens(self, first: int, end: int) -> tuple[bytes, ...]:
        """Encode the tokens of many blocks at once, which costs a fraction of doing so one by one."""
        size = self._block_size
        encoded = canonical_tokens(self._token_ids[first * size : max(first, end) * size])
        return struct.unpack(f"{4 * size}s" * (len(encoded) // (4 * size)), encoded)
