"""Chained hashes that name the content of KV blocks.

A block's KV depends on every token up to its end and on what else conditioned the computation. So block i is named by
SHA-256 over its parent's digest and its tokens; block 0's parent is the root, which spells out salt, adapter and media:

    root(salt, adapter, media) -> block 0 -> block 1 -> ...

The bytes are canonical (fixed-width little-endian tokens, length-prefixed texts), so digests agree between processes,
machines and languages.
"""

import hashlib
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
        self._encoded = b""
        self._digests = request.digests.setdefault(block_size, [])
        if not self._digests:
            self._digests.append(root_content(request.cache_key, block_size))

    def encode(self, num_blocks: int) -> None:
        """Encode the tokens of the first `num_blocks` blocks at once, for a look-up that may go through all of them."""
        self._encoded = canonical_tokens(self._token_ids[: num_blocks * self._block_size])

    def extend(self, num_blocks: int) -> None:
        """Hash up to the first `num_blocks` blocks, all of whose tokens are known."""
        digests = self._digests
        for block in range(len(digests) - 1, num_blocks):
            digests.append(digest_of(self.content(block)))

    def hashed(self, block: int) -> bytes:
        """Return the digest of `block`, hashing up to it if need be."""
        if len(self._digests) <= block + 1:
            self.extend(block + 1)
        return self._digests[block + 1]

    def digest(self, block: int) -> bytes:
        """Return the digest of a hashed block."""
        return self._digests[block + 1]

    def content(self, block: int) -> bytes:
        """Return the canonical bytes of `block`, what its digest is the hash of; its parent must be hashed."""
        size = self._block_size
        start = block * size
        if self._encoded:
            return self._digests[block] + self._encoded[4 * start : 4 * (start + size)]
        return self._digests[block] + canonical_tokens(self._token_ids[start : start + size])
