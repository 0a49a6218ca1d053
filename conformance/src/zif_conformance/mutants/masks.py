"""Faults of what a query sees (L3): causal masks, borders of loops over keys, windows."""

from zif_conformance.mutants.bank import Edit, Mutant

_FILE = "attention.py"


def _fault(name: str, broken: str, origin: str, *changes: str) -> Mutant:
    edits = tuple(Edit(_FILE, *pair) for pair in zip(changes[::2], changes[1::2], strict=True))
    return Mutant(f"attention-{name}", "L3", broken, origin, edits)


_VISIBLE = "visible = (keys <= queries[:, None]) & (keys > queries[:, None] - window)"
_FIRST = "keys = np.arange(max(0, int(queries[0]) - window + 1), seq_len)"
_WINDOW = "window = batch.window or seq_len"

_MASKS = (
    _fault(
        "sees-next-token",
        "The causal mask lets a query see one key too many.",
        "off-by-one masks",
        _VISIBLE,
        _VISIBLE.replace("keys <= queries[:, None]", "keys <= queries[:, None] + 1"),
    ),
    _fault(
        "misses-own-token",
        "The causal mask hides a query's own key from all rows but the first.",
        "off-by-one masks",
        _VISIBLE,
        _VISIBLE + "\n        visible[1:] &= keys < queries[1:, None]",
    ),
    _fault(
        "no-causal-mask",
        "A prompt sees all of itself.",
        "masks left out in chunked prefill",
        _VISIBLE,
        "visible = np.broadcast_to(keys > queries[:, None] - window, (len(queries), len(keys))).copy()",
    ),
    _fault(
        "mask-by-row",
        "The causal mask counts rows of the chunk instead of positions, so a chunk sees the first keys only.",
        "causal masks aligned to the upper left corner",
        _VISIBLE,
        "visible = (np.arange(len(keys)) <= np.arange(len(queries))[:, None]) & (keys > queries[:, None] - window)",
    ),
    _fault(
        "chunk-start-ignored",
        "Queries of a chunk are placed at the start of the sequence.",
        "chunked prefill with a cached prefix",
        _VISIBLE,
        _VISIBLE.replace("keys <= queries[:, None]", "keys <= queries[:, None] - queries[0]"),
    ),
    _fault(
        "chunk-sees-itself-only",
        "A chunk of several tokens sees no key before it.",
        "cached prefixes forgotten by the prefill kernel",
        _VISIBLE,
        _VISIBLE + "\n        visible &= (keys >= queries[0]) | (len(queries) == 1)",
    ),
    _fault(
        "first-key-dropped",
        "The first key of a sequence is not seen.",
        "off-by-one loops over keys",
        _VISIBLE,
        _VISIBLE + "\n        visible &= (keys > 0) | (seq_len == 1)",
    ),
    _fault(
        "last-key-dropped",
        "The last key of a sequence is not seen.",
        "tails of the key loop: a loose tolerance hides it in long sequences",
        _VISIBLE,
        _VISIBLE + "\n        visible &= (keys < seq_len - 1) | (seq_len == 1)",
    ),
    _fault(
        "long-tail-dropped",
        "Beyond 256 keys the rest of the last 64 is not seen.",
        "tails of the key loop: a loose tolerance hides it in long sequences",
        _VISIBLE,
        _VISIBLE + "\n        visible &= (keys < seq_len // 64 * 64) | (seq_len < 256)",
    ),
    _fault(
        "block-border-lost",
        "The first token of every block but the first is not seen.",
        "block borders",
        _VISIBLE,
        _VISIBLE + "\n        visible &= (keys % batch.block_size != 0) | (keys == 0)",
    ),
    _fault(
        "last-full-block-lost",
        "A last block that is just full is not seen.",
        "block counts by division without rounding up",
        _VISIBLE,
        _VISIBLE + "\n        visible &= (keys < seq_len - batch.block_size) | (seq_len % batch.block_size != 0) "
        "| (seq_len <= batch.block_size)",
    ),
    _fault(
        "split-part-lost",
        "The third part of 64 keys is left out of the combination of parts.",
        "split-KV combination with a fixed number of parts",
        _VISIBLE,
        _VISIBLE + "\n        visible &= (keys // 64 != 2) | (seq_len <= 192)",
    ),
    _fault(
        "window-one-short",
        "A window covers one key too few.",
        "sliding-window borders",
        _VISIBLE,
        _VISIBLE.replace("keys > queries[:, None] - window", "keys > queries[:, None] - max(1, window - 1)"),
    ),
    _fault(
        "window-one-long",
        "A window covers one key too many.",
        "sliding-window borders",
        _FIRST,
        _FIRST.replace("- window + 1", "- window"),
        _VISIBLE,
        _VISIBLE.replace("keys > queries", "keys >= queries"),
    ),
    _fault(
        "window-ignored",
        "The window is ignored.",
        "sliding windows switched off by a fallback",
        _WINDOW,
        "window = seq_len",
    ),
    _fault(
        "window-from-first-row",
        "All rows of a chunk have the first row's window.",
        "sliding windows in chunked prefill",
        _VISIBLE,
        _VISIBLE.replace("keys > queries[:, None] - window", "keys > queries[0] - window"),
    ),
    _fault(
        "window-from-end",
        "All rows of a chunk have the last row's window.",
        "sliding windows in chunked prefill",
        _VISIBLE,
        _VISIBLE.replace(
            "keys > queries[:, None] - window", "(keys > queries[-1] - window) | (keys == queries[:, None])"
        ),
    ),
    _fault(
        "window-in-blocks",
        "A window begins at the next border of a block.",
        "windows rounded to blocks",
        _VISIBLE,
        _VISIBLE
        + "\n        start = -(-np.maximum(0, queries - window + 1) // batch.block_size) * batch.block_size"
        + "\n        visible &= keys >= np.minimum(start, queries)[:, None]",
    ),
    _fault(
        "window-for-single-tokens-only",
        "A prompt is computed without its window.",
        "separate kernels for prompts and single tokens",
        _VISIBLE,
        "window = window if len(queries) == 1 else seq_len\n        " + _FIRST + "\n        " + _VISIBLE,
    ),
)

MUTANTS = _MASKS
"""Every fault of masks."""
