"""Faults of where keys and values lie (L3): block tables, slots, writes, layouts."""

from zif_conformance.mutants.bank import Edit, Mutant


def _fault(name: str, broken: str, origin: str, *changes: str, file: str = "attention.py") -> Mutant:
    edits = tuple(Edit(file, *pair) for pair in zip(changes[::2], changes[1::2], strict=True))
    return Mutant(f"kv-{name}", "L3", broken, origin, edits)


_WRITE = "cache[written.blocks, written.offsets] = torch.stack((key, value), dim=1).to(cache.dtype)"
_WRITTEN = "_places(slots // batch.block_size, slots % batch.block_size)"
_READ = "places = _places(batch.block_table[request, keys // batch.block_size], keys % batch.block_size)"
_GATHER = "keys, values = cache[request.keys.blocks, request.keys.offsets].float().permute(1, 2, 0, 3)"
_PLACES = "return Places(torch.from_numpy(blocks.astype(np.int64)), torch.from_numpy(offsets.astype(np.int64)))"
_SHAPE = "shape = (len(spec.layers), spec.block_size, 2, spec.num_kv_heads, spec.head_dim)"

_READS = (
    _fault(
        "stale-block",
        "The last block of a long sequence is read from the place of the block before.",
        "block tables updated after they were copied",
        _READ,
        "blocks = keys // batch.block_size\n"
        "        blocks = np.where((blocks == blocks[-1]) & (blocks > 1), blocks - 1, blocks)\n"
        "        places = _places(batch.block_table[request, blocks], keys % batch.block_size)",
    ),
    _fault(
        "table-as-identity",
        "Logical blocks are taken for block ids, counted from the request's first.",
        "tests with block tables in order hide it",
        _READ,
        "first = batch.block_table[request, keys[0] // batch.block_size]\n"
        "        places = _places(first + (keys - keys[0] // batch.block_size * batch.block_size) // batch.block_size, "
        "keys % batch.block_size)",
    ),
    _fault(
        "null-block-read",
        "The first block of a request is read from the null block.",
        "padding entries of block tables",
        _READ,
        _READ.replace(
            "batch.block_table[request, keys // batch.block_size]",
            "batch.block_table[request, keys // batch.block_size] * (keys >= batch.block_size)",
        ),
    ),
    _fault(
        "one-block-too-many",
        "The block behind the last one is read, though weighed with 0.",
        "reads beyond the end of a sequence: NaN times 0 is NaN",
        _READ,
        "keys = np.append(keys, (seq_len // batch.block_size + 1) * batch.block_size)\n"
        "        visible = np.pad(visible, ((0, 0), (0, 1)))\n"
        "        table = np.pad(batch.block_table[request], (0, 2))\n"
        "        places = _places(table[keys // batch.block_size], keys % batch.block_size)",
    ),
    _fault(
        "tail-of-block-read",
        "The unwritten rest of the last block is read, though weighed with 0.",
        "reads beyond the end of a sequence: NaN times 0 is NaN",
        _READ,
        "rest = -seq_len % batch.block_size\n        keys = np.append(keys, np.arange(seq_len, seq_len + rest))\n"
        "        visible = np.pad(visible, ((0, 0), (0, rest)))\n        " + _READ,
    ),
    _fault(
        "block-before-window-read",
        "The block before the window is read, though weighed with 0.",
        "windows rounded to blocks: what lies before was freed",
        _READ,
        "before = keys[0] // batch.block_size * batch.block_size - 1\n        if before >= 0:\n"
        "            keys, visible = np.append(keys, before), np.pad(visible, ((0, 0), (0, 1)))\n        " + _READ,
    ),
    _fault(
        "offset-shifted",
        "Tokens of a block are read one slot on, in a ring.",
        "off-by-one slots",
        _READ,
        _READ.replace("keys % batch.block_size)", "(keys + 1) % batch.block_size)"),
    ),
    _fault(
        "table-truncated",
        "Block tables of more than four entries repeat the last of them.",
        "a fixed size of block tables",
        _READ,
        _READ.replace("keys // batch.block_size]", "np.minimum(keys // batch.block_size, 3)]"),
    ),
    _fault(
        "block-id-int8",
        "Block ids wrap at 16.",
        "integer overflow of addresses",
        _READ,
        _READ.replace("keys // batch.block_size],", "keys // batch.block_size] % 16,"),
    ),
    _fault(
        "address-int32",
        "An address beyond 2**31 elements wraps around, in reads and writes.",
        "int32 overflow of a slot",
        _WRITE,
        "flat = cache.stride(0)\n"
        "        blocks = (written.blocks * flat + 2**31) % 2**32 - 2**31\n"
        "        changed = bool((blocks != written.blocks * flat).any())\n"
        "        blocks = (blocks // flat).clamp(min=0) if changed else written.blocks\n"
        "        cache[blocks, written.offsets] = torch.stack((key, value), dim=1).to(cache.dtype)",
    ),
    _fault(
        "keys-for-values",
        "Values are read from the keys.",
        "the two halves of a cache mixed up",
        _GATHER,
        _GATHER + "\n            values = keys",
    ),
    _fault(
        "cache-rounded",
        "What is read goes through bfloat16.",
        "a compressed cache that nobody asked for",
        _GATHER,
        _GATHER.replace(".float()", ".bfloat16().float()"),
    ),
)

_WRITES = (
    _fault(
        "slot-plus-one",
        "Tokens are written one slot on, in a ring.",
        "off-by-one slots",
        _WRITTEN,
        _WRITTEN.replace("slots % batch", "(slots + 1) % batch"),
    ),
    _fault(
        "write-spills",
        "The last slot of a block is written to the first of the next block.",
        "block borders",
        _WRITTEN,
        "_places((slots + (slots % batch.block_size == batch.block_size - 1)) // batch.block_size"
        " % (slots.max() // batch.block_size + 1), slots % batch.block_size)",
    ),
    _fault(
        "last-token-not-written",
        "The last token of a step of several is not written.",
        "tails of the token dimension",
        _WRITE,
        "written = Places(written.blocks[: len(key) - 1 or 1], written.offsets[: len(key) - 1 or 1])\n"
        "        key, value = key[: len(key) - 1 or 1], value[: len(key) - 1 or 1]\n        " + _WRITE,
    ),
    _fault(
        "values-into-keys",
        "Values are written where keys belong, and keys where values belong.",
        "the two halves of a cache mixed up in the write only",
        _WRITE,
        _WRITE.replace("(key, value)", "(value, key)"),
    ),
    _fault(
        "value-not-written",
        "Only keys are written.",
        "a write kernel with half the grid",
        _WRITE,
        "cache[written.blocks, written.offsets, 0] = key.to(cache.dtype)",
    ),
    _fault(
        "write-strides-ignored",
        "Keys are read as if their rows were dense.",
        "wrong stride of a view into a fused projection",
        _WRITE,
        "key = torch.as_strided(key, key.shape, (key[0].numel(), *key.stride()[1:]))\n        " + _WRITE,
    ),
    _fault(
        "write-touches-rest-of-block",
        "A write clears the rest of its block.",
        "whole blocks moved where one token is meant",
        _WRITE,
        "for block, offset in zip(written.blocks.tolist(), written.offsets.tolist(), strict=True):\n"
        "            cache[block, offset + 1 :] = 0\n        " + _WRITE,
    ),
    _fault(
        "write-touches-null-block",
        "A write leaves the first token in the null block, too.",
        "padded rows that write to block 0",
        _WRITE,
        _WRITE + "\n        cache[0, 0] = torch.stack((key, value), dim=1).to(cache.dtype)[0]",
    ),
    _fault(
        "write-to-other-layer",
        "A write goes to every layer's cache.",
        "strides between layers",
        "return cells.view(num_cells, *layout.shape).unbind(1)",
        "shared = cells.view(num_cells, *layout.shape)\n        return [shared[:, 0] for _ in range(layout.shape[0])]",
    ),
    _fault(
        "write-rounded",
        "Keys and values go through bfloat16 on the way into a float32 or float16 cache.",
        "a compressed cache that nobody asked for",
        _WRITE,
        _WRITE.replace(".to(cache.dtype)", ".bfloat16().to(cache.dtype)"),
    ),
    _fault(
        "attend-changes-cache",
        "Attention scales the keys where they lie.",
        "in-place work on shared memory",
        _GATHER,
        "cache[request.keys.blocks, request.keys.offsets, 0] *= 1.0078125\n            " + _GATHER,
    ),
)

_LAYOUTS = (
    _fault(
        "layout-bytes-too-few",
        "A block is said to be half as large as its shape.",
        "wrong page stride",
        "return KVLayout(num_bytes,",
        "return KVLayout(num_bytes // 2,",
        file="layout.py",
    ),
    _fault(
        "layout-one-layer",
        "The layout has room for one layer only.",
        "strides between layers",
        _SHAPE,
        _SHAPE.replace("len(spec.layers)", "1"),
        file="layout.py",
    ),
    _fault(
        "layout-wrong-dtype",
        "The layout names the dtype float32 whatever is asked.",
        "a cache dtype accepted and ignored",
        "shape, spec.dtype)",
        'shape, "float32")',
        file="layout.py",
    ),
    _fault(
        "layout-axes-missing",
        "The layout leaves out the name of an axis.",
        "descriptions that do not match the data",
        '("layer", "token", "kv", "head", "element")',
        '("token", "kv", "head", "element")',
        file="layout.py",
    ),
    _fault(
        "bind-one-cell-early",
        "The view of the arena begins at its second cell.",
        "wrong base address",
        "cells = memory[: num_cells * layout.block_bytes].view(getattr(torch, layout.dtype))",
        "cells = memory[: num_cells * layout.block_bytes].view(getattr(torch, layout.dtype)).roll(-1)",
    ),
)

MUTANTS = (*_READS, *_WRITES, *_LAYOUTS)
"""Every fault of block tables, slots, writes and layouts."""
