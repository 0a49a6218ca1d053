"""Legitimate variants of the reference platform: other ways to keep the contract. None may fail a test."""

from zif_conformance.mutants.bank import Edit, Variant


def _variant(name: str, level: str, other: str, *changes: str, file: str) -> Variant:
    edits = tuple(Edit(file, *pair) for pair in zip(changes[::2], changes[1::2], strict=True))
    # A claim is compared with what other processes see.
    return Variant(f"variant-{name}", level, other, edits, fresh=file == "platform.py")


_PRODUCT = "product = x @ weight.float().T"
_NORM = "return functional.rms_norm(x.float(), x.shape[-1:], weight.float() + weight_offset, eps).to(x.dtype)"
_SILU = "return gate * torch.sigmoid(gate) * up"
_GELU = "return 0.5 * gate * torch.erfc(gate * -math.sqrt(0.5)) * up"
_IDS = "expert_ids = wide.argsort(dim=-1, descending=True, stable=True)[:, :num_experts_per_token]"
_FUSED = """    heads, head_keys, head_values = query[None], keys[None], values[None]
    return functional.scaled_dot_product_attention(
        heads, head_keys, head_values, attn_mask=mask, scale=params.scale, enable_gqa=True
    )[0]
"""
_PLAIN = """    repeats = len(query) // len(keys)
    keys, values = keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0)
    scores = (query @ keys.mT * params.scale + mask).softmax(-1)
    return scores @ values
"""
_TILED = """    repeats = len(query) // len(keys)
    keys, values = keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0)
    scores = query @ keys.mT * params.scale + mask
    tops, sums, parts = [], [], []
    for first in range(0, scores.shape[-1], SIZE):
        part = scores[..., first : first + SIZE]
        top = part.amax(-1, keepdim=True)
        weights = (part - top.nan_to_num(neginf=0.0)).exp()
        tops.append(top)
        sums.append(weights.sum(-1, keepdim=True))
        parts.append(weights @ values[:, first : first + SIZE])
    highest = torch.stack(tops).amax(0)
    shares = [(top - highest).exp() for top in tops]
    total = sum(share * amount for share, amount in zip(shares, sums, strict=True))
    return sum(share * part for share, part in zip(shares, parts, strict=True)) / total
"""
_OUT = "out[request.rows] = score(queries, keys, values, request.visible, params).transpose(0, 1).to(query.dtype)"
_WRITE = "cache[written.blocks, written.offsets] = torch.stack((key, value), dim=1).to(cache.dtype)"
_GATHER = "keys, values = cache[request.keys.blocks, request.keys.offsets].float().permute(1, 2, 0, 3)"
_SHAPE = "shape = (len(spec.layers), spec.block_size, 2, spec.num_kv_heads, spec.head_dim)"
_AXES = '("layer", "token", "kv", "head", "element")'
_LENT = "return memory[first : first + num_bytes]"
_MEMORY = "memory = torch.zeros(num_bytes + alignment - 1, dtype=torch.uint8)"
_ANSWER = "return negotiate(workload, offer)"

_OPERATORS = (
    _variant(
        "product-in-parts",
        "L2",
        "Products are summed in parts of 48, last part first.",
        _PRODUCT,
        "parts = list(zip(x.split(48, -1), weight.float().split(48, -1), strict=True))\n"
        "    product = sum((part @ other.T for part, other in reversed(parts)), x.new_zeros(len(x), len(weight)))",
        file="operators.py",
    ),
    _variant(
        "product-in-float64",
        "L2",
        "Products are accumulated in float64.",
        _PRODUCT,
        "product = (x.double() @ weight.double().T).float()",
        file="operators.py",
    ),
    _variant(
        "product-turned",
        "L2",
        "Products are computed as the transposed product of the turned operands.",
        _PRODUCT,
        "product = (weight.float() @ x.T).T.contiguous()",
        file="operators.py",
    ),
    _variant(
        "product-in-model-dtype",
        "L2",
        "Products are the array library's own, in the model's dtype.",
        "return _linear(x.float(), weight, bias).to(x.dtype)",
        "return functional.linear(x, weight, bias)",
        file="operators.py",
    ),
    _variant(
        "gated-product-in-two-parts",
        "L2",
        "A gated product is a product, rounded, and then its activation, as core composes it.",
        "return _gated(gate_up, activation).to(x.dtype)",
        "return OpTable.gated_linear(self, x, weight, bias, activation)",
        file="operators.py",
    ),
    _variant(
        "logits-left-to-linear",
        "L2",
        "Logits are what linear gives.",
        "return _linear(hidden.float(), weight, bias)",
        "return None",
        file="operators.py",
    ),
    _variant(
        "norm-in-float64",
        "L2",
        "Norms are computed in float64.",
        _NORM,
        "wide = x.double()\n        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)\n"
        "        return (normed * (weight.double() + weight_offset)).to(x.dtype)",
        file="operators.py",
    ),
    _variant(
        "norm-by-division",
        "L2",
        "Norms divide by the root instead of multiplying by its reciprocal.",
        _NORM,
        "wide = x.float()\n        root = (wide * wide).mean(-1, keepdim=True).add(eps).sqrt()\n"
        "        return (wide / root * (weight.float() + weight_offset)).to(x.dtype)",
        file="operators.py",
    ),
    _variant(
        "norm-row-by-row",
        "L2",
        "Norms run row by row.",
        _NORM,
        "out = torch.empty_like(x)\n        for row, kept in zip(x.unbind(0), out.unbind(0), strict=True):\n"
        "            kept.copy_(functional.rms_norm(row.float(), x.shape[-1:], weight.float() + weight_offset, eps))\n"
        "        return out",
        file="operators.py",
    ),
    _variant(
        "sum-into-residual",
        "L2",
        "The sum of add and norm reuses the residual's storage, as the contract allows.",
        "total = x + residual",
        "total = residual.add_(x) if x.shape == residual.shape else x + residual",
        file="operators.py",
    ),
    _variant(
        "silu-of-library",
        "L2",
        "SiLU is the array library's.",
        _SILU,
        "return functional.silu(gate) * up",
        file="operators.py",
    ),
    _variant(
        "gelu-of-library",
        "L2",
        "GELU is the array library's.",
        _GELU,
        "return functional.gelu(gate) * up",
        file="operators.py",
    ),
    _variant(
        "up-before-gate",
        "L2",
        "The up half is multiplied before the gate.",
        _SILU,
        "return up * (gate * torch.sigmoid(gate))",
        file="operators.py",
    ),
    _variant(
        "ties-by-key",
        "L2",
        "Ties of routing are broken by sorting ids first.",
        _IDS,
        "best = wide.sort(dim=-1, descending=True, stable=True).indices\n"
        "        expert_ids = best.narrow(-1, 0, num_experts_per_token).clone()",
        file="operators.py",
    ),
    _variant(
        "experts-in-float64",
        "L2",
        "Outputs of experts are summed in float64.",
        "total = x.new_zeros(len(x), weights.down.shape[1], dtype=torch.float32)",
        "total = x.new_zeros(len(x), weights.down.shape[1], dtype=torch.float64)",
        file="operators.py",
    ),
    _variant(
        "experts-last-first",
        "L2",
        "Experts run from the last to the first.",
        "for expert in sorted(set(routed.expert_ids.flatten().tolist())):",
        "for expert in sorted(set(routed.expert_ids.flatten().tolist()), reverse=True):",
        file="operators.py",
    ),
)

_ATTENTION = (
    _variant("attention-plain", "L3", "Attention is a plain softmax of products.", _FUSED, _PLAIN, file="attention.py"),
    _variant(
        "attention-in-float64",
        "L3",
        "Attention is computed in float64.",
        _GATHER,
        _GATHER.replace(".float()", ".double()"),
        "queries = query[request.rows].float().transpose(0, 1)",
        "queries = query[request.rows].double().transpose(0, 1)",
        "mask = torch.zeros(visible.shape)",
        "mask = torch.zeros(visible.shape, dtype=torch.float64)",
        "sinks = params.sinks.float()[:, None, None].expand(-1, len(visible), 1)",
        "sinks = params.sinks.double()[:, None, None].expand(-1, len(visible), 1)",
        file="attention.py",
    ),
    _variant(
        "attention-split-32",
        "L3",
        "Keys are split into parts of 32 that are combined.",
        _FUSED,
        _TILED.replace("SIZE", "32"),
        file="attention.py",
    ),
    _variant(
        "attention-split-256",
        "L3",
        "Keys are split into parts of 256 that are combined.",
        _FUSED,
        _TILED.replace("SIZE", "256"),
        file="attention.py",
    ),
    _variant(
        "attention-split-7",
        "L3",
        "Keys are split into parts of 7 that are combined.",
        _FUSED,
        _TILED.replace("SIZE", "7"),
        file="attention.py",
    ),
    _variant(
        "attention-head-first",
        "L3",
        "Heads are computed one after the other.",
        _FUSED,
        "    repeats = len(query) // len(keys)\n"
        "    mask = mask.expand(len(query), -1, -1)\n"
        "    return torch.stack(\n"
        "        [\n"
        "            (query[h] @ keys[h // repeats].T * params.scale + mask[h]).softmax(-1) @ values[h // repeats]\n"
        "            for h in range(len(query))\n        ]\n    )\n",
        file="attention.py",
    ),
    _variant(
        "attention-last-request-first",
        "L3",
        "Requests are computed from the last to the first.",
        "for request in prepared.requests:",
        "for request in reversed(prepared.requests):",
        file="attention.py",
    ),
    _variant(
        "attention-returns-view",
        "L3",
        "The result is a view into a larger tensor.",
        "out = torch.empty_like(query)",
        "out = torch.empty(len(query), query.shape[1], query.shape[2] + 8, dtype=query.dtype)[..., :-8]",
        file="attention.py",
    ),
    _variant(
        "attention-reads-whole-prefix-backwards",
        "L3",
        "Keys are gathered from the last to the first.",
        _GATHER,
        "turned = cache[request.keys.blocks.flip(0), request.keys.offsets.flip(0)].flip(0)\n"
        "            keys, values = turned.float().permute(1, 2, 0, 3)",
        file="attention.py",
    ),
    _variant(
        "write-token-by-token",
        "L3",
        "Tokens are written one by one, values first.",
        _WRITE,
        "for token, (block, offset) in enumerate(\n"
        "            zip(written.blocks.tolist(), written.offsets.tolist(), strict=True)\n"
        "        ):\n"
        "            cache[block, offset, 1] = value[token].to(cache.dtype)\n"
        "            cache[block, offset, 0] = key[token].to(cache.dtype)",
        file="attention.py",
    ),
)

_LAYOUTS = (
    Variant(
        "variant-keys-before-values",
        "L3",
        "All keys of a block lie before its values.",
        (
            Edit("layout.py", _SHAPE, _SHAPE.replace("spec.block_size, 2", "2, spec.block_size")),
            Edit("layout.py", _AXES, '("layer", "kv", "token", "head", "element")'),
            Edit("attention.py", "*layout.shape).unbind(1)", "*layout.shape).transpose(2, 3).unbind(1)"),
        ),
    ),
    Variant(
        "variant-head-major",
        "L3",
        "A head's tokens lie together.",
        (
            Edit(
                "layout.py",
                _SHAPE,
                "shape = (len(spec.layers), 2, spec.num_kv_heads, spec.block_size, spec.head_dim)",
            ),
            Edit("layout.py", _AXES, '("layer", "kv", "head", "token", "element")'),
            Edit("attention.py", "*layout.shape).unbind(1)", "*layout.shape).permute(0, 1, 4, 2, 3, 5).unbind(1)"),
        ),
    ),
)

_MEMORY_VARIANTS = (
    _variant(
        "alignment-larger",
        "L1",
        "All memory begins at a multiple of 4096.",
        _MEMORY,
        "alignment = max(alignment, 4096)\n            " + _MEMORY,
        file="memory.py",
    ),
    _variant(
        "memory-cleared-by-hand",
        "L1",
        "Memory is cleared after it is lent.",
        _MEMORY,
        _MEMORY.replace("torch.zeros", "torch.empty") + ".zero_()",
        file="memory.py",
    ),
    _variant(
        "memory-with-margin",
        "L1",
        "Each buffer lies in a larger piece of memory.",
        _LENT,
        "wide = torch.zeros(num_bytes + 3 * alignment + 512, dtype=torch.uint8)\n"
        "        start = -wide.data_ptr() % alignment + alignment\n        return wide[start : start + num_bytes]",
        file="memory.py",
    ),
    _variant(
        "slow-health",
        "L1",
        "Health takes a while, within its deadline.",
        "answers: list[Health] = []",
        "answers: list[Health] = []\n        threading.Event().wait(min(0.05, deadline_s / 2))",
        file="device.py",
    ),
)

_PLANS = (
    _variant(
        "other-words",
        "L0",
        "Refusals are worded in another way.",
        _ANSWER,
        "answer = negotiate(workload, offer)\n        if isinstance(answer, Refusal):\n"
        "            return Refusal(self.name, tuple(f'Cannot run this: {reason}' for reason in answer.reasons))\n"
        "        return answer",
        file="platform.py",
    ),
    _variant(
        "reasons-sorted",
        "L0",
        "Reasons come in another order.",
        _ANSWER,
        "answer = negotiate(workload, offer)\n        if isinstance(answer, Refusal):\n"
        "            return Refusal(self.name, tuple(sorted(answer.reasons, reverse=True)))\n        return answer",
        file="platform.py",
    ),
    _variant(
        "smaller-cache",
        "L0",
        "The cache takes a smaller share of memory.",
        "KVSizing(max_share=0.5)",
        "KVSizing(max_share=0.2)",
        file="platform.py",
    ),
    _variant(
        "one-block-size",
        "L0",
        "One block size is claimed.",
        "block_sizes=(8, 16, 32, 64, 128),",
        "block_sizes=(32,),",
        file="platform.py",
    ),
    _variant(
        "fewer-features",
        "L0",
        "Sinks are not claimed.",
        "            Feature.ATTENTION_SINKS,\n",
        "",
        file="platform.py",
    ),
)

VARIANTS = (*_OPERATORS, *_ATTENTION, *_LAYOUTS, *_MEMORY_VARIANTS, *_PLANS)
"""Every legitimate variant."""
