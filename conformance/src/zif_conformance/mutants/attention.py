"""Faults of how keys are weighed (L3): scales, soft caps, sinks, heads, batches."""

from zif_conformance.mutants.bank import Edit, Mutant

_FILE = "attention.py"


def _fault(name: str, broken: str, origin: str, *changes: str) -> Mutant:
    edits = tuple(Edit(_FILE, *pair) for pair in zip(changes[::2], changes[1::2], strict=True))
    return Mutant(f"attention-{name}", "L3", broken, origin, edits)


_VISIBLE = "visible = (keys <= queries[:, None]) & (keys > queries[:, None] - window)"
_CAPPED = "scores = torch.tanh(query @ keys.mT * (params.scale / params.softcap)) * params.softcap"
_HIDDEN = "scores = torch.where(visible, scores, -torch.inf)"
_FUSED = "heads, head_keys, head_values, attn_mask=mask, scale=params.scale, enable_gqa=True"
_HEADS = "heads, head_keys, head_values = query[None], keys[None], values[None]"
_PADDED = "keys, values = functional.pad(keys, (0, 0, 0, 1)), functional.pad(values, (0, 0, 0, 1))"
_SINKS = "sinks = params.sinks.float()[:, None, None].expand(-1, len(visible), 1)"
_CAPPED_SINK = "total = total + torch.exp(params.sinks.float()[:, None, None] - highest)"
_REPEATED = "keys, values = keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0)"
_OUT = "out[request.rows] = score(queries, keys, values, request.visible, params).transpose(0, 1).to(query.dtype)"
_EMPTY = "out = torch.empty_like(query)"
_SCORE = "score = _attend if params.softcap is None else _attend_capped"

_SCORES = (
    _fault(
        "scale-twice",
        "The scale is applied to the query and to the score.",
        "scale applied twice",
        _HEADS,
        _HEADS.replace("query[None]", "query[None] * params.scale"),
    ),
    _fault(
        "scale-missing",
        "The scale of the layer is ignored for 1.",
        "query scaling folded into the weights of some models only",
        _FUSED,
        _FUSED.replace("params.scale", "1.0"),
    ),
    _fault(
        "scale-from-padded-head",
        "The scale is taken from a head size rounded up to 64.",
        "padded head sizes",
        _FUSED,
        _FUSED.replace("params.scale", "(-(-query.shape[-1] // 64) * 64) ** -0.5"),
    ),
    _fault(
        "scale-twice-with-softcap",
        "With a soft cap, the scale is applied twice.",
        "scale applied twice",
        _CAPPED,
        _CAPPED.replace("query @", "(query * params.scale) @"),
    ),
    _fault(
        "softcap-missing",
        "The soft cap is ignored.",
        "soft caps unknown to a fused kernel",
        _SCORE,
        "score = _attend",
    ),
    _fault(
        "softcap-before-scale",
        "The soft cap is applied to the unscaled score.",
        "order of scale and soft cap",
        _CAPPED,
        "scores = torch.tanh(query @ keys.mT / params.softcap) * params.softcap * params.scale",
    ),
    _fault(
        "softcap-not-multiplied-back",
        "Scores stay between -1 and 1.",
        "half of the soft cap's formula",
        _CAPPED,
        "scores = torch.tanh(query @ keys.mT * (params.scale / params.softcap))",
    ),
    _fault(
        "softcap-after-mask",
        "The soft cap is applied after the mask, so that hidden keys have a finite score.",
        "order of mask and soft cap",
        _CAPPED + "\n    " + _HIDDEN,
        "scores = torch.where(visible, query @ keys.mT * params.scale, -torch.inf)\n"
        "    scores = torch.tanh(scores / params.softcap) * params.softcap",
    ),
    _fault(
        "softcap-clamped",
        "The soft cap is a hard one.",
        "a clamp in the place of the tanh",
        _CAPPED,
        "scores = (query @ keys.mT * params.scale).clamp(-params.softcap, params.softcap)",
    ),
    _fault(
        "softcap-ignores-sinks",
        "With a soft cap, sinks are left out.",
        "combinations of features that no kernel has",
        _CAPPED_SINK,
        "pass",
    ),
    _fault(
        "sink-dropped",
        "Sinks are left out.",
        "sinks unknown to a fused kernel",
        "mask = torch.cat((mask.expand(len(query), -1, -1), sinks), dim=-1)",
        "mask = torch.cat((mask.expand(len(query), -1, -1), sinks - torch.inf), dim=-1)",
    ),
    _fault(
        "sink-twice",
        "Sinks are counted twice, as when two parts of the keys each add them.",
        "split-KV combination with sinks",
        _SINKS,
        _SINKS.replace("params.sinks.float()", "(params.sinks.float() + 0.6931472)"),
    ),
    _fault(
        "sink-scaled",
        "The scale is applied to sinks.",
        "sinks treated as scores of a key",
        _SINKS,
        _SINKS.replace("params.sinks.float()", "(params.sinks.float() * params.scale)"),
    ),
    _fault(
        "sink-of-first-head",
        "All heads use the first head's sink.",
        "head index of sinks",
        _SINKS,
        _SINKS.replace("params.sinks.float()", "params.sinks.float()[:1].expand(len(query))"),
    ),
    _fault(
        "sink-by-kv-head",
        "Sinks are assigned to heads as if groups were interleaved.",
        "head index of sinks",
        _SINKS,
        _SINKS.replace("params.sinks.float()", "params.sinks.float().view(-1, len(keys)).T.reshape(-1)"),
    ),
    _fault(
        "sink-has-a-value",
        "The value of a sink is the last value instead of none.",
        "a sink as a copy of a real key",
        _PADDED,
        "keys, values = functional.pad(keys, (0, 0, 0, 1)), torch.cat((values, values[:, -1:]), dim=1)",
    ),
    _fault(
        "softmax-without-maximum",
        "The softmax does not subtract the maximum, and overflows on large scores.",
        "softmax kernels without the shift",
        "highest = scores.amax(-1, keepdim=True)",
        "highest = torch.zeros_like(scores[..., :1])",
    ),
    _fault(
        "weights-not-normalized",
        "With a soft cap, weights are not divided by their sum.",
        "a missing last step of an online softmax",
        "return weights @ values / total",
        "return weights @ values",
    ),
    _fault(
        "nan-swallowed",
        "A NaN in a result becomes 0.",
        "sanitizing of intermediate values",
        _OUT,
        _OUT.replace(".transpose(0, 1)", ".nan_to_num(nan=0.0).transpose(0, 1)"),
    ),
    _fault(
        "scores-in-storage-dtype",
        "Queries, keys and values go through bfloat16 whatever the dtype.",
        "dtype downcasts in attention kernels",
        _HEADS,
        _HEADS + "\n    heads, head_keys = heads.bfloat16().float(), head_keys.bfloat16().float()",
    ),
    _fault(
        "weights-in-half",
        "Weights of the softmax are rounded to float16 before the second product.",
        "dtype downcasts in attention kernels",
        _FUSED,
        _FUSED.replace("head_values", "head_values.half().float()"),
    ),
)


_HEADS_AND_BATCHES = (
    _fault(
        "heads-interleaved",
        "Query head h uses KV head h modulo K instead of h divided by the group size.",
        "head mapping of grouped-query attention",
        _HEADS,
        _HEADS + "\n    repeats = len(query) // len(keys)"
        "\n    head_keys, head_values = head_keys.repeat(1, repeats, 1, 1), head_values.repeat(1, repeats, 1, 1)",
    ),
    _fault(
        "heads-interleaved-with-softcap",
        "With a soft cap, query head h uses KV head h modulo K.",
        "head mapping of grouped-query attention",
        _REPEATED,
        "keys, values = keys.repeat(repeats, 1, 1), values.repeat(repeats, 1, 1)",
    ),
    _fault(
        "first-kv-head-for-all",
        "All query heads use the first KV head.",
        "head mapping of grouped-query attention",
        _HEADS,
        _HEADS + "\n    head_keys, head_values = head_keys[:, :1], head_values[:, :1]",
    ),
    _fault(
        "value-head-shifted",
        "Values come from the neighbouring KV head.",
        "strides of the value cache",
        _HEADS,
        _HEADS + "\n    head_values = head_values.roll(1, 1)",
    ),
    _fault(
        "heads-of-size-72-cut",
        "A head size that is no multiple of 16 is rounded down.",
        "head sizes without a kernel of their own",
        _HEADS,
        _HEADS + "\n    size = query.shape[-1] // 16 * 16 or query.shape[-1]"
        "\n    heads, head_keys = heads[..., :size], head_keys[..., :size]",
    ),
    _fault(
        "first-row-special",
        "The first request of a batch sees one key less, if it has others beside it.",
        "results that depend on the batch",
        _VISIBLE,
        _VISIBLE + "\n        visible &= (keys > 0) | (request > 0) | (seq_len == 1)",
    ),
    _fault(
        "length-of-the-longest",
        "Every request is as long as the first.",
        "padded batches",
        _VISIBLE,
        _VISIBLE.replace("keys <= queries[:, None]", "keys <= queries[:, None] - (seq_len != batch.seq_lens[0])"),
    ),
    _fault(
        "second-request-for-all",
        "The block table of the neighbouring request is read.",
        "batch index of block tables",
        "batch.block_table[request, keys // batch.block_size]",
        "batch.block_table[(request + 1) % len(batch.seq_lens), keys // batch.block_size]",
    ),
    _fault(
        "last-request-left-out",
        "The last request of many has no result.",
        "grid sizes rounded down",
        _OUT,
        "if len(prepared.requests) > 4 and request is prepared.requests[-1]:\n"
        "                out[request.rows] = 0\n                continue\n            " + _OUT,
    ),
    _fault(
        "rows-uninitialised",
        "Rows of chunks beyond the 16th hold what memory held.",
        "outputs that no thread writes",
        _EMPTY,
        "out = torch.full_like(query, torch.nan)",
        _OUT,
        _OUT + "\n            out[request.rows][16:] = torch.nan",
    ),
    _fault(
        "rows-of-chunk-reversed",
        "Rows of a chunk come back in reversed order.",
        "row order of packed batches",
        _OUT,
        _OUT.replace(".transpose(0, 1).to(", ".transpose(0, 1).flip(0).to("),
    ),
    _fault(
        "result-kept-wide",
        "The result stays float32.",
        "missing cast back to the model's dtype",
        _EMPTY,
        "out = torch.empty_like(query, dtype=torch.float32)",
    ),
    _fault(
        "nan-spreads",
        "A NaN in one request's rows reaches the next request's.",
        "reductions shared between requests of a tile",
        _OUT,
        _OUT + "\n            out[request.rows.stop : request.rows.stop + 1] *= 0\n"
        "            follower = request.rows.stop < len(query) and bool(out[request.rows].isnan().any())\n"
        "            if follower:\n                query = query.clone()\n"
        "                query[request.rows.stop] = torch.nan",
    ),
    _fault(
        "result-depends-on-batch",
        "With more than four requests, results are rounded to bfloat16 on the way.",
        "another kernel for larger batches",
        _OUT,
        _OUT.replace(
            ".transpose(0, 1).to(",
            ".transpose(0, 1).to(torch.bfloat16 if len(prepared.requests) > 4 else query.dtype).to(",
        ),
    ),
)

MUTANTS = (
    *_SCORES,
    *_HEADS_AND_BATCHES,
)
"""Every fault of scores, heads and batches."""
