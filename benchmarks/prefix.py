"""What finding a computed prefix costs: time of a look-up, and memory of the index per block.

The physics: a prompt of N tokens has N / block_size blocks, each one SHA-256 over about 100 bytes when it is new, one
search of the index and one comparison of its content when it is not. Memory per cached block: its content and its
entries in the flat arrays of pool and index; `control_plane_memory.py` measures a larger cache.

Floors: a 32,768-token prompt whose hashes are known is found in under 2 ms; 200 bytes a block.

    python benchmarks/prefix.py
"""

import json
import statistics
import time
import tracemalloc
from pathlib import Path

from zif.contract import FullAttentionSpec, KVGroup, Request, SamplingParams, slab_arena
from zif.kv import PagedBlockManager
from zif.null.platform import null_layout

BLOCK_SIZE, PROMPT_TOKENS, FLOOR_MS, FLOOR_BYTES = 16, 32_769, 2.0, 200
SPEC = FullAttentionSpec((0,), 1, 8, BLOCK_SIZE, "float32")


def block_manager(num_blocks: int) -> PagedBlockManager:
    group = KVGroup(SPEC, null_layout(SPEC))
    arena = slab_arena((num_blocks + 200) * group.layout.block_bytes, (group,))
    return PagedBlockManager(arena, enable_prefix_caching=True, max_step_tokens=PROMPT_TOKENS)


def request(number: int, prompt: list[int]) -> Request:
    return Request(number, prompt, len(prompt), SamplingParams(), max_total_tokens=len(prompt) + 1)


def compute(blocks: PagedBlockManager, asked: Request) -> None:
    """Let a request compute its whole prompt and end."""
    blocks.begin(asked)
    end = asked.num_tokens - 1
    assert blocks.reserve(asked, end), "the arena is too small for the benchmark"
    asked.num_computed_tokens = end
    blocks.commit(asked)
    blocks.release(asked)


def lookup_ms(blocks: PagedBlockManager, asked: Request) -> float:
    started = time.perf_counter()
    blocks.begin(asked)
    elapsed = time.perf_counter() - started
    assert asked.num_computed_tokens == PROMPT_TOKENS - 1, "the prefix was not found"
    blocks.release(asked)
    return 1e3 * elapsed


def bytes_per_block(num_blocks: int) -> float:
    tracemalloc.start()
    blocks = block_manager(num_blocks)
    tokens = 1000 * BLOCK_SIZE
    for number in range(num_blocks * BLOCK_SIZE // tokens):
        compute(blocks, request(number, list(range(number * tokens, (number + 1) * tokens + 1))))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / num_blocks


def main() -> None:
    blocks = block_manager(4000)
    prompt = [token * 7 % 50_000 for token in range(PROMPT_TOKENS)]
    compute(blocks, request(0, prompt))
    cold = statistics.median(lookup_ms(blocks, request(number, prompt)) for number in range(1, 12))
    known = request(100, prompt)
    lookup_ms(blocks, known)
    warm = statistics.median(lookup_ms(blocks, known) for _ in range(31))
    per_block = bytes_per_block(20_000)
    print(f"look-up of {PROMPT_TOKENS - 1} tokens: {cold:.2f} ms hashing them, {warm:.2f} ms hashed (floor {FLOOR_MS})")
    print(f"memory of the control plane: {per_block:.0f} bytes per cached block (floor {FLOOR_BYTES})")
    print(json.dumps({"cold_ms": cold, "warm_ms": warm, "bytes_per_block": per_block, "file": Path(__file__).name}))


if __name__ == "__main__":
    main()
