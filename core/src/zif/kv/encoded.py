"""Names for the blocks of an encoder's output: they depend on its input alone, and are shared all together or not.

The sequence's own blocks are named in `hashing.py`. `manager.py` and `prefix.py` are the only callers.
"""

from zif.contract import KVSpec, Request
from zif.kv.hashing import canonical_tokens, digest_of, root_content

_VERSION = b"encoder:"


class EncodedBlocks:
    """Digests and contents of the blocks that hold one request's encoder output in one group."""

    def __init__(self, request: Request, spec: KVSpec) -> None:
        self.num_blocks = spec.num_blocks(request.num_encoder_tokens)
        self._size = spec.block_size
        self._root = digest_of(
            _VERSION + canonical_tokens([request.num_encoder_tokens]) + root_content(request.cache_key, spec.block_size)
        )

    def content(self, block: int) -> bytes:
        """Return what names a block, as long as the contents of other blocks of this size."""
        return self._root + canonical_tokens([block] * self._size)

    def digest(self, block: int) -> bytes:
        """Return the digest of a block."""
        return digest_of(self.content(block))
