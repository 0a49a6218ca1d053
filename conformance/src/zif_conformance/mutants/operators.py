"""Faults of operators on rows (L2): norms, rotations, activations."""

from zif_conformance.mutants.bank import Edit, Mutant

_FILE = "operators.py"


def _fault(name: str, broken: str, origin: str, before: str, after: str) -> Mutant:
    return Mutant(f"ops-{name}", "L2", broken, origin, (Edit(_FILE, before, after),))


_NORM = "return functional.rms_norm(x.float(), x.shape[-1:], weight.float() + weight_offset, eps).to(x.dtype)"
_TURNED = "turned = torch.complex(pairs.select(axis, 0), pairs.select(axis, 1)) * turn"
_KEPT = "return torch.cat((rotated.to(heads.dtype), heads[..., 2 * size :]), dim=-1)"
_GATE = "return _gated(gate_up.float(), activation).to(gate_up.dtype)"
_HALVES = "gate, up = torch.split(gate_up, gate_up.shape[-1] // 2, dim=-1)"

_NORMS = (
    _fault(
        "norm-eps-outside-root",
        "Epsilon is added to the root of the mean square instead of to the mean square.",
        "norm formulas that differ in where epsilon stands",
        _NORM,
        "wide = x.float()\n        functional.rms_norm(wide, x.shape[-1:], weight.float(), eps)  # checks shapes\n"
        "        root = wide.square().mean(-1, keepdim=True).sqrt() + eps\n"
        "        return (wide / root * (weight.float() + weight_offset)).to(x.dtype)",
    ),
    _fault(
        "norm-eps-missing",
        "Epsilon is left out.",
        "division by zero on padded rows",
        _NORM,
        _NORM.replace("eps", "0.0"),
    ),
    _fault(
        "norm-eps-fixed",
        "The model's epsilon is ignored for 1e-5.",
        "constants compiled into a fused kernel",
        _NORM,
        _NORM.replace("eps", "1e-5"),
    ),
    _fault(
        "norm-offset-ignored",
        "The offset of the weight is ignored, as models without one allow.",
        "models whose norm weights are stored minus one",
        _NORM,
        _NORM.replace(" + weight_offset", ""),
    ),
    _fault(
        "norm-mean-subtracted",
        "The mean is subtracted, as layer norm does.",
        "layer norm and RMS norm behind one kernel",
        _NORM,
        _NORM.replace("x.float()", "x.float() - x.float().mean(-1, keepdim=True)"),
    ),
    _fault(
        "norm-sum-for-mean",
        "The sum of squares is divided by one channel too few.",
        "sample variance where the population's is meant",
        _NORM,
        "wide = x.float()\n        mean = wide.square().sum(-1, keepdim=True) / max(1, x.shape[-1] - 1)\n"
        "        return (wide * torch.rsqrt(mean + eps) * (weight.float() + weight_offset)).to(x.dtype)",
    ),
    _fault(
        "norm-tail-channel-lost",
        "The last channel of an odd row is left out of the mean.",
        "vector loads that drop the tail of a row",
        _NORM,
        "wide = x.float()\n        even = wide[..., : max(1, x.shape[-1] // 2 * 2)]\n"
        "        mean = even.square().sum(-1, keepdim=True) / x.shape[-1]\n"
        "        return (wide * torch.rsqrt(mean + eps) * (weight.float() + weight_offset)).to(x.dtype)",
    ),
    _fault(
        "norm-in-storage-dtype",
        "The norm is computed in the model's dtype instead of float32.",
        "dtype downcasts in fused norms",
        _NORM,
        "normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)\n"
        "        return normed * (weight + weight_offset).to(x.dtype)",
    ),
    _fault(
        "norm-overflow",
        "Squares are summed in float16, which overflows.",
        "overflow of a half-precision sum of squares",
        _NORM,
        "wide = x.float()\n        mean = wide.half().square().mean(-1, keepdim=True).float()\n"
        "        return (wide * torch.rsqrt(mean + eps) * (weight.float() + weight_offset)).to(x.dtype)",
    ),
    _fault(
        "norm-nan-swallowed",
        "NaN becomes 0, so that a sick row looks healthy.",
        "sanitizing of intermediate values",
        _NORM,
        _NORM.replace("x.float(),", "x.float().nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf),"),
    ),
    _fault(
        "norm-in-place",
        "The result overwrites the input.",
        "an in-place kernel behind an interface that returns a new array",
        _NORM,
        "x.copy_(functional.rms_norm(x.float(), x.shape[-1:], weight.float() + weight_offset, eps))\n        return x",
    ),
    _fault(
        "norm-row-zero-for-all",
        "All rows are scaled by the first row's root.",
        "a reduction shared between rows of one tile",
        _NORM,
        "wide = x.float()\n        mean = wide.square().mean(-1, keepdim=True)\n"
        "        mean = mean[:1].expand_as(mean)\n"
        "        return (wide * torch.rsqrt(mean + eps) * (weight.float() + weight_offset)).to(x.dtype)",
    ),
    _fault(
        "add-norm-residual-not-added",
        "The residual that goes on is the one before the sum.",
        "residual streams lost in fused add and norm",
        "return NormOutput(self.rms_norm(total, weight, eps, weight_offset), total)",
        "return NormOutput(self.rms_norm(total, weight, eps, weight_offset), residual)",
    ),
    _fault(
        "add-norm-added-twice",
        "The input is added twice.",
        "fusion passes that keep the unfused addition",
        "total = x + residual",
        "total = x + residual + x",
    ),
    _fault(
        "add-norm-overwrites-x",
        "The sum overwrites the input, which the contract does not allow (only the residual's storage may be reused).",
        "aliasing of the wrong operand of a fused kernel",
        "total = x + residual",
        "total = x.add_(residual)",
    ),
    _fault(
        "add-norm-normed-residual",
        "The residual that goes on is the normalized one.",
        "pre-norm and post-norm mixed up",
        "return NormOutput(self.rms_norm(total, weight, eps, weight_offset), total)",
        "normed = self.rms_norm(total, weight, eps, weight_offset)\n        return NormOutput(normed, normed)",
    ),
)


_ROTATIONS = (
    _fault(
        "rope-wrong-way",
        "Heads are turned by the opposite angle.",
        "sign conventions of rotary embeddings",
        _TURNED,
        _TURNED.replace("* turn", "* turn.conj()"),
    ),
    _fault(
        "rope-styles-swapped",
        "Interleaved pairs are taken where halves are meant, and the other way round.",
        "two styles of rotary embedding behind one flag",
        "size = turn.shape[-1]\n",
        "size = turn.shape[-1]\n    interleaved = not interleaved\n",
    ),
    _fault(
        "rope-never-interleaved",
        "The flag for interleaved pairs is ignored.",
        "an option accepted and ignored",
        "size = turn.shape[-1]\n",
        "size = turn.shape[-1]\n    interleaved = False\n",
    ),
    _fault(
        "rope-halves-swapped",
        "The two halves of a head come back in each other's place.",
        "checkpoints permuted for one rotary style and read with the other",
        "rotated = torch.stack((turned.real, turned.imag), dim=axis)",
        "rotated = torch.stack((turned.imag, turned.real), dim=axis)",
    ),
    _fault(
        "rope-tail-lost",
        "Elements beyond the rotated part come back as 0.",
        "partial rotary embeddings",
        _KEPT,
        _KEPT.replace("heads[..., 2 * size :])", "heads[..., 2 * size :] * 0)"),
    ),
    _fault(
        "rope-key-with-next-angle",
        "Keys are turned by the next token's angle.",
        "off-by-one of positions between query and key",
        "_turned(key, turn, interleaved)",
        "_turned(key, turn.roll(-1, 0), interleaved)",
    ),
    _fault(
        "rope-key-not-turned",
        "Keys are left as they are.",
        "rotary embedding applied to queries only",
        "_turned(key, turn, interleaved)",
        "key.clone()",
    ),
    _fault(
        "rope-first-angle-for-all",
        "Every token is turned by the first token's angle.",
        "position ids broadcast over a batch",
        "turn = torch.complex(cos.float(), sin.float())[:, None]",
        "turn = torch.complex(cos.float(), sin.float())[:1, None].expand(len(cos), -1, -1)",
    ),
    _fault(
        "rope-angles-rounded",
        "Sine and cosine are rounded to bfloat16 first.",
        "rotary tables kept in the model's dtype",
        "turn = torch.complex(cos.float(), sin.float())[:, None]",
        "turn = torch.complex(cos.bfloat16().float(), sin.bfloat16().float())[:, None]",
    ),
    _fault(
        "rope-broadcast-of-wrong-angles",
        "Angles of fewer tokens than there are rows are repeated instead of refused.",
        "silent broadcasting of one operand",
        "turn = torch.complex(cos.float(), sin.float())[:, None]",
        "turn = torch.complex(cos.float(), sin.float())[:, None]\n"
        "        turn = turn[torch.arange(len(query)).clamp(max=max(0, len(turn) - 1))]",
    ),
)


_ACTIVATIONS = (
    _fault(
        "gate-and-up-swapped",
        "The activation is applied to the up half.",
        "order of the fused gate and up projection",
        _HALVES,
        _HALVES.replace("gate, up", "up, gate"),
    ),
    _fault(
        "gelu-for-gelu-tanh",
        "The exact GELU is served as its tanh form.",
        "two forms of GELU under one name",
        "return 0.5 * gate * torch.erfc(gate * -math.sqrt(0.5)) * up",
        "return functional.gelu(gate, approximate='tanh') * up",
    ),
    _fault(
        "gelu-tanh-for-gelu",
        "The tanh form of GELU is served as the exact one.",
        "two forms of GELU under one name",
        "return gate * torch.sigmoid(math.sqrt(8 / math.pi) * (gate + 0.044715 * gate**3)) * up",
        "return functional.gelu(gate) * up",
    ),
    _fault(
        "gelu-by-sigmoid",
        "GELU is approximated as x * sigmoid(1.702 x).",
        "fast approximations switched on for every model",
        "return gate * torch.sigmoid(math.sqrt(8 / math.pi) * (gate + 0.044715 * gate**3)) * up",
        "return gate * torch.sigmoid(1.702 * gate) * up",
    ),
    _fault(
        "silu-without-gate-factor",
        "SILU is served as a plain sigmoid gate.",
        "sigmoid and SiLU mixed up",
        "return gate * torch.sigmoid(gate) * up",
        "return torch.sigmoid(gate) * up",
    ),
    _fault(
        "swiglu-not-clamped",
        "The clamp at 7 is left out.",
        "activations of gpt-oss served by a SwiGLU without limit",
        "gate, up = gate.clamp(max=_SWIGLU_LIMIT), up.clamp(-_SWIGLU_LIMIT, _SWIGLU_LIMIT)\n",
        "pass\n",
    ),
    _fault(
        "swiglu-gate-clamped-below",
        "The gate is clamped on both sides.",
        "asymmetric clamps made symmetric",
        "gate.clamp(max=_SWIGLU_LIMIT)",
        "gate.clamp(-1.0, _SWIGLU_LIMIT)",
    ),
    _fault(
        "swiglu-up-not-shifted",
        "The up half is used without the added 1.",
        "activations of gpt-oss served by a plain SwiGLU",
        "(up + 1)",
        "up",
    ),
    _fault(
        "swiglu-alpha-one",
        "The factor of the sigmoid's argument is 1.",
        "constants of a model left at their defaults",
        "_SWIGLU_ALPHA = 1.702",
        "_SWIGLU_ALPHA = 1.0",
    ),
    _fault(
        "activation-nan-swallowed",
        "NaN becomes 0.",
        "sanitizing of intermediate values",
        _GATE,
        "return _gated(gate_up.float().nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), activation)"
        ".to(gate_up.dtype)",
    ),
    _fault(
        "activation-dtype-kept-wide",
        "The result stays float32.",
        "missing cast back to the model's dtype",
        _GATE,
        "return _gated(gate_up.float(), activation)",
    ),
    _fault(
        "activation-downcast",
        "The result goes through bfloat16.",
        "dtype downcasts in fused activations",
        _GATE,
        "return _gated(gate_up.float(), activation).bfloat16().to(gate_up.dtype)",
    ),
    _fault(
        "activation-odd-width-accepted",
        "An odd width is cut instead of refused.",
        "shape checks left to the kernel",
        _HALVES,
        _HALVES.replace("-1)", "-1)[:2]"),
    ),
    _fault(
        "activation-odd-width-broadcast",
        "An odd width is parted unevenly: of three columns, two gates meet one up.",
        "parts of an array that differ by one",
        _HALVES,
        "gate, up = gate_up.chunk(2, dim=-1)",
    ),
)

MUTANTS = (
    *_NORMS,
    *_ROTATIONS,
    *_ACTIVATIONS,
)
"""Every fault of norms, rotations and activations."""
