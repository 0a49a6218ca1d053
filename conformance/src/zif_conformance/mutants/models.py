"""Faults of a device that models show (L4, L5): what only a second step, a full batch or a second engine meets."""

from zif_conformance.mutants.bank import Edit, Mutant


def _fault(name: str, broken: str, origin: str, *changes: str, file: str = "attention.py", level: str = "L4") -> Mutant:
    edits = tuple(Edit(file, *pair) for pair in zip(changes[::2], changes[1::2], strict=True))
    return Mutant(f"model-{name}", level, broken, origin, edits)


_PREPARED = "return PreparedStep(_places(slots // batch.block_size, slots % batch.block_size), tuple(_requests(batch)))"
_WRITE = "cache[written.blocks, written.offsets] = torch.stack((key, value), dim=1).to(cache.dtype)"
_VISIBLE = "visible = (keys <= queries[:, None]) & (keys > queries[:, None] - window)"
_WINDOW = "window = batch.window or seq_len"
_LINEAR = "return _linear(x.float(), weight, bias).to(x.dtype)"
_OUT = "out[request.rows] = score(queries, keys, values, request.visible, params).transpose(0, 1).to(query.dtype)"
_ANSWER = "return negotiate(workload, offer)"
_FREE = "def _free(self, buffer: Buffer[torch.Tensor]) -> None:"
_CLAIM = "collectives=frozenset(Collective),"
_PRODUCT = "product = x @ weight.float().T"
_LINEAR_WIDE = (
    "out = _linear(x if x.dtype == torch.float64 else x.float(), weight, bias)\n        return out.to(weight.dtype)"
)


def _workload(changes: str) -> str:
    return f"import dataclasses\n\n        workload = dataclasses.replace(workload, {changes})\n        {_ANSWER}"


_STEPS = (
    _fault(
        "step-replayed",
        "A step of the same size as an earlier one is computed with the earlier one's tables.",
        "captured graphs replayed with the metadata of their capture",
        _PREPARED,
        "kept = self.__dict__.setdefault('kept', {})\n        fresh = "
        + _PREPARED.removeprefix("return ")
        + "\n        return kept.setdefault((len(slots), len(batch.seq_lens), batch.window), fresh)",
    ),
    _fault(
        "write-arrives-late",
        "Keys and values of a step arrive after its attention has read the cache.",
        "missing synchronization between a copy and a kernel",
        _WRITE,
        "late = self.__dict__.setdefault('late', {})\n"
        "        for place in late.pop(cache.data_ptr(), []):\n            cache[place[0], place[1]] = place[2]\n"
        "        rows = torch.stack((key, value), dim=1).to(cache.dtype)\n"
        "        late[cache.data_ptr()] = [(written.blocks, written.offsets, rows)]",
    ),
    _fault(
        "tables-of-the-row-before",
        "A row of the batch keeps the block table of the request that had it first.",
        "block tables updated after they were copied",
        _PREPARED,
        "kept = self.__dict__.setdefault('kept', {})\n"
        "        table = np.array(batch.block_table)\n"
        "        for row in range(len(table)):\n"
        "            first = kept.setdefault((row, batch.window), table[row].copy())\n"
        "            width = min(len(first), table.shape[1])\n"
        "            table[row, :width] = np.where(first[:width] > 0, first[:width], table[row, :width])\n"
        "        import dataclasses\n\n        batch = dataclasses.replace(batch, block_table=table)\n        "
        + _PREPARED,
    ),
    _fault(
        "chunk-forgets-the-prefix",
        "A chunk of several tokens sees no key before it.",
        "cached prefixes forgotten by the prefill kernel",
        _VISIBLE,
        _VISIBLE + "\n        visible &= (keys >= queries[0]) | (len(queries) == 1)",
    ),
    _fault(
        "next-block-cleared",
        "A write to the first slot of a block clears the block behind it.",
        "whole blocks moved where one token is meant",
        _WRITE,
        "for block in written.blocks[written.offsets == 0].tolist():\n"
        "            cache[block + 1 : block + 2] = 0\n        " + _WRITE,
    ),
    _fault(
        "layers-share-a-cache",
        "Every layer of a group has the first one's cache.",
        "strides between layers",
        "return cells.view(num_cells, *layout.shape).unbind(1)",
        "shared = cells.view(num_cells, *layout.shape)\n        return [shared[:, 0] for _ in range(layout.shape[0])]",
    ),
    _fault(
        "window-for-prompts-only",
        "Single tokens are computed without the window.",
        "separate kernels for prompts and single tokens",
        _WINDOW,
        "window = (batch.window or seq_len) if last_row - first_row > 1 else seq_len",
    ),
    _fault(
        "freed-blocks-cleared-late",
        "The block that a sequence is about to fill is cleared when its second slot is written.",
        "blocks zeroed after they were handed out",
        _WRITE,
        _WRITE + "\n        second = written.blocks[written.offsets == 1]\n        cache[second, 0] = 0",
    ),
    _fault(
        "last-rows-lost",
        "A product of more than eight rows leaves out the last one.",
        "tails of the token dimension",
        _LINEAR,
        "out = _linear(x.float(), weight, bias).to(x.dtype)\n        out[8:][-1:] = 0\n        return out",
        file="operators.py",
    ),
)

_NEIGHBOURS = (
    _fault(
        "nan-swallowed",
        "Products make 0 of NaN and infinity, so that a sick request looks healthy.",
        "sanitizing of intermediate values",
        _LINEAR,
        "return _linear(x.float().nan_to_num(0.0, 0.0, 0.0), weight, bias).nan_to_num(0.0, 0.0, 0.0).to(x.dtype)",
        file="operators.py",
    ),
    _fault(
        "nan-spreads",
        "A NaN of one request reaches all requests of the step.",
        "scales taken over the whole batch",
        _LINEAR,
        "return _linear(x.float() + 0 * x.float().sum(), weight, bias).to(x.dtype)",
        file="operators.py",
    ),
    Mutant(
        "model-batch-invariance-is-a-lie",
        "L4",
        "Results are claimed not to depend on the batch, and large products are summed in another order.",
        "a capability that lies",
        (
            Edit("platform.py", _CLAIM, "batch_invariant=True,\n    " + _CLAIM),
            Edit("operators.py", _LINEAR, "x = x.double() if len(x) > 4 else x\n        " + _LINEAR_WIDE),
            Edit("operators.py", _PRODUCT, _PRODUCT.replace("weight.float()", "weight.to(x.dtype)")),
        ),
    ),
    _fault(
        "requests-beyond-the-third-lost",
        "The fourth request of a step and those behind it get the third's attention.",
        "grid sizes rounded down",
        _OUT,
        _OUT + "\n            if len(prepared.requests) > 3 and request is prepared.requests[-1]:\n"
        "                out[request.rows] = out[prepared.requests[2].rows][-1:]",
    ),
    _fault(
        "memory-kept-at-close",
        "Memory that is given back by its tag stays on loan.",
        "leaks that show at the second model",
        _FREE,
        f"def free_tag(self, tag: str) -> None:\n        self._live_tags = tag\n\n    {_FREE}",
        file="memory.py",
    ),
)

_ENGINES = (
    _fault(
        "kv-memory-ignored",
        "The KV memory that was asked for is ignored.",
        "options accepted and ignored",
        _ANSWER,
        _workload("kv_bytes=None"),
        file="platform.py",
        level="L5",
    ),
    _fault(
        "memory-limit-ignored",
        "The limit of memory is ignored.",
        "options accepted and ignored",
        _ANSWER,
        _workload("memory_limit_bytes=None"),
        file="platform.py",
        level="L5",
    ),
    _fault(
        "hidden-block-size",
        "A block size that is not claimed is planned.",
        "silent fallbacks",
        _ANSWER,
        "import dataclasses\n\n"
        "        more = dataclasses.replace(_CAPABILITIES, block_sizes=tuple(range(1, 257)))\n"
        "        offer = dataclasses.replace(offer, device=dataclasses.replace(offer.device, capabilities=more))\n"
        "        " + _ANSWER,
        file="platform.py",
        level="L5",
    ),
    _fault(
        "hidden-head-size",
        "Head sizes that are not claimed are planned without a word.",
        "silent fallbacks",
        _ANSWER,
        "import dataclasses\n\n"
        "        more = dataclasses.replace(_CAPABILITIES, max_head_size=1 << 20)\n"
        "        offer = dataclasses.replace(offer, device=dataclasses.replace(offer.device, capabilities=more))\n"
        "        " + _ANSWER,
        file="platform.py",
        level="L5",
    ),
    _fault(
        "prefix-hit-at-position-0",
        "After a prefix hit, queries stand at the start of the sequence.",
        "KV of a hit read before the hit was checked",
        _VISIBLE,
        _VISIBLE.replace("keys <= queries[:, None]", "keys <= queries[:, None] - queries[0] * (len(queries) > 1)"),
        level="L5",
    ),
    _fault(
        "shared-block-overwritten",
        "The first write to a block clears the block with the number before it.",
        "KV written into blocks that another request shares",
        _WRITE,
        "for block in written.blocks[written.offsets == 0].tolist():\n"
        "            cache[block - 1 : block] *= 0.5\n        " + _WRITE,
        level="L5",
    ),
    _fault(
        "softcap-forgotten",
        "The soft cap is ignored.",
        "soft caps unknown to a fused kernel",
        "score = _attend if params.softcap is None else _attend_capped",
        "score = _attend",
        level="L5",
    ),
    _fault(
        "sinks-forgotten",
        "Sinks are left out.",
        "sinks unknown to a fused kernel",
        "mask = torch.cat((mask.expand(len(query), -1, -1), sinks), dim=-1)",
        "mask = torch.cat((mask.expand(len(query), -1, -1), sinks - torch.inf), dim=-1)",
        level="L5",
    ),
    _fault(
        "second-expert-lost",
        "The last chosen expert of a token is left out.",
        "capacity limits that drop tokens",
        "tokens, choices = (routed.expert_ids == expert).nonzero(as_tuple=True)",
        "tokens, choices = (routed.expert_ids[:, : max(1, routed.expert_ids.shape[1] - 1)] == expert)"
        ".nonzero(as_tuple=True)",
        file="operators.py",
        level="L5",
    ),
    _fault(
        "graph-replayed",
        "A single row through the same weight gives the result of the first time.",
        "captured graphs that read the input of their capture",
        _LINEAR,
        "out = _linear(x.float(), weight, bias).to(x.dtype)\n        if len(x) != 1:\n            return out\n"
        "        return self.__dict__.setdefault('kept', {}).setdefault(weight.data_ptr(), out)",
        file="operators.py",
        level="L5",
    ),
)

MUTANTS = (*_STEPS, *_NEIGHBOURS, *_ENGINES)
"""Every fault of a device that models show."""
