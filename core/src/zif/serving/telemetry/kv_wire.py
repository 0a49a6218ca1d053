"""KV events as bytes: the encoding that cache-aware routers read.

A message has three frames: topic, sequence number (8 bytes, big endian), payload. The payload is msgpack:

    [seconds since 1970, [event, ...], data parallel rank]
    ["BlockStored", [hash, ...], parent hash or nil, [token id, ...], block size, nil, medium, nil, keys or nil, group]
    ["BlockRemoved", [hash, ...], medium, group]
    ["AllBlocksCleared"]

A hash is the last 8 bytes of the block's digest as an unsigned integer. The nils are the adapter's number and name.
`keys` has an entry per block: nil, or a list with the name of what else conditions a chain that starts there.
This is version 1; golden bytes in the tests hold it. The stream tells token ids: whoever may read it may read prompts.

Sources: the array form of `vllm/distributed/kv_events.py`; readers of llm-d (`pkg/kvevents`) and Dynamo (`kv-router`).
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from zif.kv.journal import AllCleared, BlockEvent, BlocksStored

ENCODING_VERSION: Final = 1
END_OF_REPLAY: Final = (-1).to_bytes(8, "big", signed=True)
SEQUENCE_BYTES: Final = 8

_DEVICE_MEDIUM: Final = "GPU"
"""What readers call the memory of whatever device computes; they weigh blocks by it."""

_HASH_BYTES: Final = 8


def encode_batch(events: Sequence[BlockEvent], time_s: float, rank: int = 0) -> bytes:
    """Return the payload for what happened in one step."""
    return _ENCODER.encode([time_s, [_event(event) for event in events], rank])


def encode_sequence(number: int) -> bytes:
    """Return the sequence frame of a message."""
    return number.to_bytes(SEQUENCE_BYTES, "big")


def block_hash(digest: bytes) -> int:
    """Return how the stream names a block."""
    return int.from_bytes(digest[-_HASH_BYTES:], "big")


def _event(event: BlockEvent) -> list[object]:
    if isinstance(event, AllCleared):
        return ["AllBlocksCleared"]
    hashes = [block_hash(digest) for digest in event.digests]
    if not isinstance(event, BlocksStored):
        return ["BlockRemoved", hashes, _DEVICE_MEDIUM, event.group]
    parent = None if event.parent is None else block_hash(event.parent)
    keys = None
    if event.condition is not None:
        keys = [[event.condition[-_HASH_BYTES:].hex()], *[None] * (len(hashes) - 1)]
    return [
        "BlockStored", hashes, parent, event.token_ids, event.block_size, None, _DEVICE_MEDIUM, None, keys, event.group
    ]  # fmt: skip


_ENCODER: Final = msgspec.msgpack.Encoder()
