"""Faults of products with weights held as integers (L2), and other ways to compute them that are right."""

from zif_conformance.mutants.bank import Edit, Mutant, Variant

_FILE = "quantized.py"


def _fault(name: str, broken: str, origin: str, before: str, after: str, file: str = _FILE) -> Mutant:
    return Mutant(f"quantized-{name}", "L2", broken, origin, (Edit(file, before, after),))


_ROWS = "rows, row_scales = (x, x.new_ones(len(x), 1)) if not weight.scheme.dynamic_activations else _rounded(x)"
_PEAKS = "peaks = x.abs().amax(dim=-1, keepdim=True)"
_ROUNDED = "return torch.round(x / scales), scales"
_CODES = "return weight.codes\n"
_HALVES = "codes = torch.stack((halves % 16, halves // 16), dim=-2).flatten(-3)"
_ZEROS = "numbers = numbers - weight.zeros[:, group, None]"
_SUMS = "total += rows[:, part].double() @ numbers.T * weight.scales[:, group]"
_PRODUCT = "product = (total * row_scales).float()"
_BIAS = "return product if bias is None else product + bias.float()"
_CHECK = "if codes.shape[-1] != x.shape[-1] or weight.scales.shape != (len(codes), num_groups):"
_ENTRY = "return QuantizedWeight(stack.scheme, stack.codes[index], stack.scales[index], zeros)"
_PARTS = "return _entry(weights.gate_up, expert), _entry(weights.down, expert)"
_GATED = "inner = _gated(quantized_product(x, gate_up, _entry(weights.gate_up_bias, expert)), activation)"
_GATE_UP = "gate_up = quantized_product(x.float(), weight, bias)"

_WEIGHTS = (
    _fault(
        "scale-of-the-next-output",
        "Every output is multiplied by its neighbour's scale.",
        "scales permuted apart from the rows they belong to",
        _SUMS,
        _SUMS.replace("weight.scales[", "weight.scales.roll(1, 0)["),
    ),
    _fault(
        "scale-of-the-next-group",
        "A group is multiplied by the scale of the one after it.",
        "off-by-one of the group index in grouped kernels",
        _SUMS,
        _SUMS.replace("[:, group]", "[:, (group + 1) % num_groups]"),
    ),
    _fault(
        "scales-in-half",
        "Scales are rounded to float16.",
        "scales packed in the dtype of old checkpoints",
        _SUMS,
        _SUMS.replace("weight.scales[:, group]", "weight.scales[:, group].half().double()"),
    ),
    _fault(
        "last-group-lost",
        "The last of several groups is left out.",
        "loops over groups that round down",
        "for group in range(num_groups):",
        "for group in range(max(1, num_groups - 1)):",
    ),
    _fault(
        "zero-one-more",
        "Zero points are used as stored less one.",
        "formats that store zero points minus one, read by those that do not",
        _ZEROS,
        f"{_ZEROS} - 1",
    ),
    _fault(
        "zero-of-the-first-group",
        "Every group has the zero point of the first.",
        "zero points broadcast from one group",
        _ZEROS,
        _ZEROS.replace("[:, group, None]", "[:, :1]"),
    ),
    _fault(
        "zero-wraps",
        "Codes less zero points wrap around at 8 bits.",
        "differences of bytes taken in bytes",
        _ZEROS,
        f"{_ZEROS}\n            numbers = numbers.to(torch.int8).double()",
    ),
    _fault(
        "zero-in-four-bits",
        "Zero points are cut to the bits of a code.",
        "zero points packed like codes, where one more value is in use",
        _ZEROS,
        "top = 127 if weight.scheme.bits == 8 else 15\n            "
        + _ZEROS.replace("[:, group, None]", "[:, group, None].clamp(max=top)"),
    ),
    _fault(
        "halves-swapped",
        "The upper half of a byte comes before the lower.",
        "order of nibbles that differs by format",
        _HALVES,
        _HALVES.replace("(halves % 16, halves // 16)", "(halves // 16, halves % 16)"),
    ),
    _fault(
        "halves-interleaved",
        "The two codes of a byte are taken for neighbours.",
        "order of nibbles that differs by format",
        _HALVES,
        _HALVES.replace("dim=-2", "dim=-1"),
    ),
    _fault(
        "middle-at-seven",
        "Without zero points, 7 stands for zero among codes of 4 bits.",
        "symmetric codes of 4 bits with two conventions",
        "_MIDDLE = 8",
        "_MIDDLE = 7",
    ),
    _fault(
        "lowest-code-clamped",
        "The code -128 is read as -127.",
        "kernels that were written for symmetric codes",
        _CODES,
        "return weight.codes.clamp(min=-127)\n",
    ),
)

_ACTIVATIONS = (
    _fault(
        "activations-truncated",
        "Activations are cut to the code nearer zero.",
        "conversions to integers that truncate",
        _ROUNDED,
        "return torch.trunc(x / scales), scales",
    ),
    _fault(
        "halves-away-from-zero",
        "Activations half way between two codes go to the larger one.",
        "rounding modes of conversions",
        _ROUNDED,
        "ratios = x / scales\n    return ratios.sign() * (ratios.abs() + 0.5).floor(), scales",
    ),
    _fault(
        "one-scale-for-all-tokens",
        "All rows of activations share the scale of the largest.",
        "per-tensor where per-token is meant",
        _PEAKS,
        "peaks = x.abs().amax().expand(len(x), 1) if len(x) else x[:, :1]",
    ),
    _fault(
        "activations-not-rounded",
        "Activations keep their dtype where codes are asked for.",
        "a quantized product served by another one",
        _ROWS,
        "rows, row_scales = x, x.new_ones(len(x), 1)",
    ),
    _fault(
        "activations-always-rounded",
        "Activations become codes where they are to keep their dtype.",
        "a quantized product served by another one",
        _ROWS,
        "rows, row_scales = _rounded(x)",
    ),
    _fault(
        "activations-in-place",
        "Activations are divided in the caller's memory.",
        "an in-place kernel behind an interface that leaves arguments alone",
        _ROUNDED,
        "return x.div_(scales).round(), scales",
    ),
    _fault(
        "zeros-divided-by-zero",
        "A row of zeros has a scale of zero, and its codes are no numbers.",
        "scales of padded rows",
        "scales = scales.masked_fill(scales == 0, 1.0)",
        "pass",
    ),
    _fault(
        "nan-swallowed",
        "NaN and infinity become codes of 0.",
        "conversions of NaN to integers",
        _ROWS,
        _ROWS.replace("_rounded(x)", "_rounded(x.nan_to_num(0.0, 0.0, 0.0))"),
    ),
    _fault(
        "infinity-saturates",
        "Infinity is taken for the largest number.",
        "conversions to integers that saturate",
        _ROWS,
        _ROWS.replace("_rounded(x)", "_rounded(x.clamp(-3e38, 3e38))"),
    ),
    _fault(
        "strides-ignored",
        "Rows are read as if they were dense.",
        "wrong stride of a view into a fused projection",
        _ROWS,
        f"x = torch.as_strided(x, x.shape, (x.shape[1], 1))\n    {_ROWS}",
    ),
)

_SUMS_AND_SHAPES = (
    _fault(
        "sums-in-half",
        "Sums of codes are kept in float16.",
        "accumulation in the storage dtype",
        _SUMS,
        "total += (rows[:, part].double() @ numbers.T).half().double() * weight.scales[:, group]",
    ),
    _fault(
        "sums-saturate",
        "Sums of codes stop at 24 bits.",
        "accumulators too narrow for the longest row",
        _SUMS,
        "total += (rows[:, part].double() @ numbers.T).clamp(-(2.0**23), 2.0**23) * weight.scales[:, group]",
    ),
    _fault(
        "bias-twice",
        "The bias is added twice.",
        "bias added by the kernel and again by what follows",
        _BIAS,
        _BIAS.replace("+ bias", "+ 2 * bias"),
    ),
    _fault(
        "bias-scaled",
        "The bias is multiplied by the scale of the row, too.",
        "bias added before the results are scaled",
        _PRODUCT,
        f"{_PRODUCT}\n    bias = None if bias is None else bias * row_scales.float()",
    ),
    _fault(
        "scales-of-another-size-accepted",
        "Scales of another group size than the scheme's are read as they come.",
        "shape checks left to the kernel",
        _CHECK,
        "if codes.shape[-1] != x.shape[-1]:",
    ),
)

_GATED_PRODUCTS = (
    _fault(
        "gated-bias-dropped",
        "The bias of a gated product is left out.",
        "biases ignored by fused kernels of quantized weights",
        _GATE_UP,
        _GATE_UP.replace("bias", "None"),
        "operators.py",
    ),
    _fault(
        "gated-ups-have-scales-of-gates",
        "The second half of a gated product uses the scales of the first.",
        "one pointer to the scales of two halves",
        _GATE_UP,
        "half = len(weight.codes) // 2\n"
        "            scales = torch.cat((weight.scales[:-half], weight.scales[:half]))\n"
        "            weight = QuantizedWeight(weight.scheme, weight.codes, scales, weight.zeros)\n"
        f"            {_GATE_UP}",
        "operators.py",
    ),
    _fault(
        "gated-sums-in-bfloat16",
        "What a quantized product leaves to be gated is bfloat16 in every dtype.",
        "one type of scratch memory for all models",
        _GATE_UP,
        f"{_GATE_UP}.bfloat16().float()",
        "operators.py",
    ),
    _fault(
        "gated-odd-rows-cut",
        "A gate without an up is left out instead of refused, where weights are codes.",
        "shape checks left to the kernel",
        _GATE_UP,
        f"{_GATE_UP}\n            gate_up = gate_up[:, : gate_up.shape[-1] // 2 * 2]",
        "operators.py",
    ),
    _fault(
        "gated-strides-ignored",
        "A gated product of codes reads rows as if they were dense.",
        "wrong stride of a view into a fused projection",
        _GATE_UP,
        _GATE_UP.replace("x.float()", "torch.as_strided(x, x.shape, (x.shape[1], 1)).float()"),
        "operators.py",
    ),
)

_EXPERTS = (
    _fault(
        "experts-scales-of-the-first",
        "All experts have the scales of the first.",
        "index of scales in grouped kernels",
        _ENTRY,
        _ENTRY.replace("stack.scales[index]", "stack.scales[0]"),
    ),
    _fault(
        "experts-down-has-scales-of-gate",
        "The second product of an expert uses the scales of the first.",
        "arguments of two fused products mixed up",
        _PARTS,
        "down = weights.down\n    places = tuple(slice(size) for size in down.scales.shape)\n"
        "    down = QuantizedWeight(down.scheme, down.codes, weights.gate_up.scales[places], down.zeros)\n"
        "    return _entry(weights.gate_up, expert), _entry(down, expert)",
    ),
    _fault(
        "experts-share-twice",
        "Router weights are applied twice.",
        "router weights applied by the kernel and again by the sum",
        "own * routed.weights[rows, places, None]",
        "own * routed.weights[rows, places, None] ** 2",
        "operators.py",
    ),
    _fault(
        "experts-gate-bias-dropped",
        "The bias of gate and up is left out.",
        "biases of experts ignored by a back end",
        _GATED,
        "inner = _gated(quantized_product(x, gate_up, None), activation)",
        "operators.py",
    ),
    _fault(
        "experts-negative-id-ignored",
        "Tokens of a negative expert id lose that expert instead of being refused.",
        "out-of-range expert ids",
        "if not all(0 <= expert < num_experts for",
        "if not all(expert < num_experts for",
        "operators.py",
    ),
)

MUTANTS = (*_WEIGHTS, *_ACTIVATIONS, *_SUMS_AND_SHAPES, *_GATED_PRODUCTS, *_EXPERTS)
"""Every fault of quantized products."""

VARIANTS = (
    Variant(
        "variant-quantized-reciprocal",
        "L2",
        "Activations are multiplied by the reciprocal of their scale.",
        (Edit(_FILE, _ROUNDED, "return torch.round(x * (1.0 / scales)), scales"),),
    ),
    Variant(
        "variant-quantized-widened-first",
        "L2",
        "Weights become float32 numbers before they are multiplied.",
        (
            Edit(
                _FILE,
                _SUMS,
                "total += (rows[:, part] @ (numbers * weight.scales[:, group, None]).float().T)",
            ),
        ),
    ),
    Variant(
        "variant-quantized-logits-left-to-linear",
        "L2",
        "Logits of codes are what quantized_linear gives.",
        (Edit("operators.py", "return quantized_product(hidden.float(), weight, bias)", "return None"),),
    ),
    Variant(
        "variant-quantized-experts-rounded-between",
        "L2",
        "What is between the two products of an expert is rounded to bfloat16's bits where the model has them.",
        (
            Edit(
                "operators.py",
                "own = _quantized_expert(x[rows].float(), weights, expert, activation)",
                "own = _quantized_expert(x[rows], weights, expert, activation).float()",
            ),
            Edit(
                "operators.py",
                _GATED,
                "dtype, x = x.dtype, x.float()\n    " + _GATED.replace("activation)", "activation).to(dtype).float()"),
            ),
        ),
    ),
)
"""Legitimate ways to compute quantized products."""
