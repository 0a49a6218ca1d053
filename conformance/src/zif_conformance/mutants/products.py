"""Faults of products and experts (L2): linear, gated products, routing, mixtures."""

from zif_conformance.mutants.bank import Edit, Mutant

_FILE = "operators.py"


def _fault(name: str, broken: str, origin: str, before: str, after: str) -> Mutant:
    return Mutant(f"ops-{name}", "L2", broken, origin, (Edit(_FILE, before, after),))


_LINEAR = "return _linear(x.float(), weight, bias).to(x.dtype)"
_GATE_UP = "gate_up = _linear(x.float(), weight, bias)"
_GATED = "return _gated(gate_up, activation).to(x.dtype)"
_IDS = "expert_ids = wide.argsort(dim=-1, descending=True, stable=True)[:, :num_experts_per_token]"
_SHARE = "total[tokens] += share[:, None] * _expert(x[tokens].float(), weights, expert, activation)"

_PRODUCTS = (
    _fault(
        "linear-bias-dropped",
        "The bias is left out.",
        "biases of projections ignored by a back end",
        "return product if bias is None else product + bias.float()",
        "return product",
    ),
    _fault(
        "linear-bias-twice",
        "The bias is added twice.",
        "bias added by the kernel and again after the reduction over ranks",
        "return product if bias is None else product + bias.float()",
        "return product if bias is None else product + 2 * bias.float()",
    ),
    _fault(
        "linear-tail-column-lost",
        "The inner size is rounded down to a multiple of 32.",
        "tails of the inner dimension",
        "product = x @ weight.float().T",
        "inner = x.shape[-1] // 32 * 32 or x.shape[-1]\n    product = x[..., :inner] @ weight[:, :inner].float().T",
    ),
    _fault(
        "linear-half-accumulator",
        "Sums are kept in bfloat16 every 64 terms.",
        "accumulation in the storage dtype",
        "product = x @ weight.float().T",
        "product = x.new_zeros(*x.shape[:-1], len(weight))\n"
        "    for part, other in zip(x.split(64, -1), weight.float().split(64, -1), strict=True):\n"
        "        product = (product + part @ other.T).bfloat16().float()",
    ),
    _fault(
        "linear-inner-size-cut",
        "Operands of different inner sizes are cut to the shorter one instead of refused.",
        "shape checks left to the kernel",
        "product = x @ weight.float().T",
        "inner = min(x.shape[-1], weight.shape[-1])\n    product = x[..., :inner] @ weight[:, :inner].float().T",
    ),
    _fault(
        "linear-last-row-lost",
        "The last of many rows comes back as 0.",
        "tails of the token dimension",
        _LINEAR,
        "out = _linear(x.float(), weight, bias).to(x.dtype)\n        out[16:][-1:] = 0\n        return out",
    ),
    _fault(
        "linear-strides-ignored",
        "Rows are read as if they were dense.",
        "wrong stride of a view into a fused projection",
        _LINEAR,
        "dense = torch.as_strided(x, x.shape, (x.shape[1], 1))\n"
        "        return _linear(dense.float(), weight, bias).to(x.dtype)",
    ),
    _fault(
        "linear-int8-input",
        "The input is quantized to 8 bits on the way.",
        "a quantized kernel chosen without being asked for",
        _LINEAR,
        "scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127\n"
        "        return _linear((x.float() / scale).round() * scale, weight, bias).to(x.dtype)",
    ),
)

_GATED_PRODUCTS = (
    _fault(
        "gated-halves-swapped",
        "The activation of a gated product is applied to its second half.",
        "order of the fused gate and up projection",
        _GATED,
        _GATED.replace("gate_up,", "torch.cat(gate_up.tensor_split(2, -1)[::-1], -1),"),
    ),
    _fault(
        "gated-rows-alternate",
        "Rows of a gated product are taken as gate, up, gate, up.",
        "weights packed for kernels that gate within a tile",
        _GATED,
        _GATED.replace("gate_up,", "torch.cat((gate_up[:, ::2], gate_up[:, 1::2]), -1),"),
    ),
    _fault(
        "gated-last-gate-meets-its-neighbour",
        "Of an odd number of gates beyond one, the last meets the up before its own.",
        "tails of kernels that compute gates in pairs",
        _GATED,
        "last = gate_up.shape[-1] - 1\n"
        "        if last // 2 and last // 2 % 2 == 0:\n"
        "            gate_up[:, last] = gate_up[:, last - 1]\n"
        f"        {_GATED}",
    ),
    _fault(
        "gated-bias-of-ups-dropped",
        "The second half of a gated product's bias is left out.",
        "bias pointers of fused kernels that point at one half",
        _GATE_UP,
        "kept = None if bias is None else bias * (torch.arange(len(bias)) < len(bias) // 2)\n"
        "            gate_up = _linear(x.float(), weight, kept)",
    ),
    _fault(
        "gated-activation-fixed",
        "Every gated product uses SILU.",
        "an option accepted and ignored",
        _GATED,
        _GATED.replace("activation", "Activation.SILU"),
    ),
    _fault(
        "gated-downcast",
        "The result of a gated product goes through bfloat16.",
        "dtype downcasts in fused activations",
        _GATED,
        _GATED.replace(".to(", ".bfloat16().to("),
    ),
    _fault(
        "gated-dtype-kept-wide",
        "The result of a gated product stays float32.",
        "missing cast back to the model's dtype",
        _GATED,
        "return _gated(gate_up, activation)",
    ),
    _fault(
        "gated-strides-ignored",
        "A gated product reads rows as if they were dense.",
        "wrong stride of a view into a fused projection",
        _GATE_UP,
        "dense = torch.as_strided(x, x.shape, (x.shape[1], 1))\n"
        "            gate_up = _linear(dense.float(), weight, bias)",
    ),
    _fault(
        "gated-nan-spreads",
        "A row that is not finite makes every row NaN.",
        "scratch memory of other rows multiplied by zero",
        _GATED,
        _GATED.replace("gate_up,", "gate_up + 0.0 * gate_up.sum(0),"),
    ),
    _fault(
        "gated-odd-rows-cut",
        "A gate without an up is left out instead of refused.",
        "shape checks left to the kernel",
        _GATED,
        _GATED.replace("gate_up,", "gate_up[:, : gate_up.shape[-1] // 2 * 2],"),
    ),
    _fault(
        "gated-inner-size-cut",
        "Operands of different inner sizes are cut to the shorter one instead of refused.",
        "shape checks left to the kernel",
        _GATE_UP,
        "gate_up = _linear(x.float()[:, : weight.shape[1]], weight, bias)",
    ),
)

_EXPERTS = (
    _fault(
        "route-tie-to-highest",
        "Of equal logits the highest expert goes first.",
        "ties of top-k kernels",
        _IDS,
        "expert_ids = wide.shape[-1] - 1 - wide.flip(-1).argsort(dim=-1, descending=True, stable=True)"
        "[:, :num_experts_per_token]",
    ),
    _fault(
        "route-worst-first",
        "The chosen experts come in rising order of their weights.",
        "order of top-k results",
        _IDS,
        _IDS + ".flip(-1)",
    ),
    _fault(
        "route-by-id",
        "The chosen experts come in the order of their ids.",
        "order of top-k results",
        _IDS,
        _IDS + ".sort(-1).values",
    ),
    _fault(
        "route-not-normalized",
        "Weights that are to sum to 1 are left as they are.",
        "renormalization of router weights",
        "weights = weights / weights.sum(-1, keepdim=True)",
        "weights = weights * 1.0",
    ),
    _fault(
        "route-always-normalized",
        "Weights are normalized also where the model does not ask for it.",
        "renormalization of router weights",
        "if routing == Routing.SOFTMAX_TOPK_NORMALIZED:",
        "if routing != Routing.TOPK_SOFTMAX:",
    ),
    _fault(
        "route-softmax-over-all",
        "The softmax over the chosen logits runs over all of them.",
        "order of softmax and top-k",
        "wide.gather(-1, expert_ids).softmax(-1)",
        "wide.softmax(-1).gather(-1, expert_ids)",
    ),
    _fault(
        "route-softmax-without-maximum",
        "The softmax does not subtract the maximum, and overflows on large logits.",
        "softmax kernels without the shift",
        "weights = wide.softmax(-1).gather(-1, expert_ids)",
        "weights = (wide.exp() / wide.exp().sum(-1, keepdim=True)).gather(-1, expert_ids)",
    ),
    _fault(
        "route-int32-ids",
        "Expert ids come as int32.",
        "dtype of indices",
        "return RouterOutput(weights, expert_ids)",
        "return RouterOutput(weights, expert_ids.int())",
    ),
    _fault(
        "route-half-weights",
        "Router weights come in the model's dtype.",
        "router precision",
        "return RouterOutput(weights, expert_ids)",
        "return RouterOutput(weights.to(logits.dtype).float(), expert_ids)",
    ),
    _fault(
        "experts-share-squared",
        "Router weights are applied to the input of an expert and to its output.",
        "router weights applied twice by fused expert kernels",
        _SHARE,
        _SHARE.replace("share[:, None] *", "share[:, None] ** 2 *"),
    ),
    _fault(
        "experts-last-choice-dropped",
        "The last chosen expert of a token is left out.",
        "capacity limits that drop tokens",
        "tokens, choices = (routed.expert_ids == expert).nonzero(as_tuple=True)",
        "tokens, choices = (routed.expert_ids[:, : max(1, routed.expert_ids.shape[1] - 1)] == expert)"
        ".nonzero(as_tuple=True)",
    ),
    _fault(
        "experts-last-token-dropped",
        "An expert with more than four tokens leaves out its last.",
        "capacity limits that drop tokens",
        "share = routed.weights[tokens, choices].float()",
        "tokens, choices = tokens[:4], choices[:4]\n            share = routed.weights[tokens, choices].float()",
    ),
    _fault(
        "experts-neighbours-bias",
        "An expert uses its neighbour's bias.",
        "index of biases in fused expert kernels",
        "None if weights.down_bias is None else weights.down_bias[expert]",
        "None if weights.down_bias is None else weights.down_bias[expert - 1]",
    ),
    _fault(
        "experts-gate-bias-dropped",
        "The bias of gate and up is left out.",
        "biases of experts ignored by a back end",
        "inner = _gated(_linear(x, weights.gate_up[expert], gate_up_bias), activation)",
        "inner = _gated(_linear(x, weights.gate_up[expert], None), activation)",
    ),
    _fault(
        "experts-unknown-id-ignored",
        "Tokens of an expert that does not exist come back as 0 instead of being refused.",
        "out-of-range expert ids",
        'raise ValueError(f"expert ids must be from 0 to {len(weights.gate_up) - 1}: {routed.expert_ids!r}")',
        "return total.to(x.dtype)",
    ),
    _fault(
        "experts-negative-id-wraps",
        "A negative expert id counts from the end.",
        "signed indices",
        "if ((routed.expert_ids < 0) | (routed.expert_ids >= len(weights.gate_up))).any():",
        "if (routed.expert_ids >= len(weights.gate_up)).any():",
    ),
    _fault(
        "experts-activation-fixed",
        "Every expert uses SILU.",
        "an option accepted and ignored",
        "gate_up_bias), activation)",
        "gate_up_bias), Activation.SILU)",
    ),
    _fault(
        "experts-sum-downcast",
        "Partial sums over experts are kept in the model's dtype.",
        "accumulation in the storage dtype",
        "total = x.new_zeros(len(x), weights.down.shape[1], dtype=torch.float32)",
        "total = x.new_zeros(len(x), weights.down.shape[1], dtype=torch.float32 if x.dtype.itemsize > 2 else x.dtype)",
    ),
)

MUTANTS = (
    *_PRODUCTS,
    *_GATED_PRODUCTS,
    *_EXPERTS,
)
"""Every fault of products, gated products, routing and experts."""
