"""Faults of logits (L2): of output matrices in the model's dtype, and held as integers."""

from zif_conformance.mutants.bank import Edit, Mutant

_FILE = "operators.py"


def _fault(name: str, broken: str, origin: str, before: str, after: str) -> Mutant:
    return Mutant(name, "L2", broken, origin, (Edit(_FILE, before, after),))


_LOGITS = "return _linear(hidden.float(), weight, bias)"
_QUANTIZED = "return quantized_product(hidden.float(), weight, bias)"

_OF_NUMBERS = (
    _fault(
        "ops-logits-rounded",
        "Logits are rounded to the model's dtype and widened again.",
        "the output matrix run as any other projection",
        _LOGITS,
        "return _linear(hidden.float(), weight, bias).to(hidden.dtype).float()",
    ),
    _fault(
        "ops-logits-in-bfloat16",
        "Logits come rounded to bfloat16, as float32.",
        "one kernel of an output type for all models",
        _LOGITS,
        "return _linear(hidden.float(), weight, bias).bfloat16().float()",
    ),
    _fault(
        "ops-logits-not-widened",
        "Logits come in the model's dtype.",
        "dtype of results",
        _LOGITS,
        "return _linear(hidden.float(), weight, bias).to(hidden.dtype)",
    ),
    _fault(
        "ops-logits-bias-dropped",
        "The bias is left out.",
        "biases of output matrices ignored by a back end",
        _LOGITS,
        "return _linear(hidden.float(), weight, None)",
    ),
    _fault(
        "ops-logits-one-scale-for-all",
        "Hidden rows are divided by a power of two that fits the whole batch, and logits multiplied by it.",
        "scales of a whole tensor where each row has its own",
        _LOGITS,
        "scale = torch.cat((hidden.float().abs().flatten(), torch.ones(1))).max().log2().ceil().exp2()\n"
        "        wide_bias = None if bias is None else bias.float() / scale\n"
        "        return _linear(hidden.float() / scale, weight, wide_bias) * scale",
    ),
    _fault(
        "ops-logits-rows-swapped",
        "The first two rows of many come in each other's place.",
        "row order of packed batches",
        _LOGITS,
        "out = _linear(hidden.float(), weight, bias)\n"
        "        return torch.cat((out[:2].flip(0), out[2:])) if len(out) > 16 else out",
    ),
    _fault(
        "ops-logits-tail-of-vocabulary-lost",
        "Logits beyond a multiple of 16 are 0.",
        "tails of the vocabulary",
        _LOGITS,
        "out = _linear(hidden.float(), weight, bias)\n"
        "        out[:, len(weight) // 16 * 16 or len(weight) :] = 0\n        return out",
    ),
    _fault(
        "ops-logits-strides-ignored",
        "Hidden rows are read as if they were dense.",
        "wrong stride of a view into a batch",
        _LOGITS,
        "dense = torch.as_strided(hidden, hidden.shape, (hidden.shape[1], 1))\n"
        "        return _linear(dense.float(), weight, bias)",
    ),
    _fault(
        "ops-logits-single-row-left",
        "A single row is left to linear, more are not.",
        "kernels that decline some shapes",
        _LOGITS,
        "return _linear(hidden.float(), weight, bias) if len(hidden) != 1 else None",
    ),
    _fault(
        "ops-logits-hidden-overwritten",
        "Hidden states of float32 are overwritten with zeros.",
        "scratch memory shared with an argument",
        _LOGITS,
        "wide = hidden.float()\n        out = _linear(wide, weight, bias)\n        wide.zero_()\n        return out",
    ),
    _fault(
        "ops-logits-short-bias-padded",
        "A bias that is too short is filled up with zeros instead of refused.",
        "shape checks left to the kernel",
        _LOGITS,
        "full = None if bias is None else functional.pad(bias, (0, len(weight) - len(bias)))\n"
        "        return _linear(hidden.float(), weight, full)",
    ),
)

_OF_CODES = (
    _fault(
        "quantized-logits-rounded",
        "Logits are rounded to the model's dtype and widened again.",
        "the output matrix run as any other projection",
        _QUANTIZED,
        f"{_QUANTIZED}.to(hidden.dtype).float()",
    ),
    _fault(
        "quantized-logits-not-widened",
        "Logits come in the model's dtype.",
        "dtype of results",
        _QUANTIZED,
        f"{_QUANTIZED}.to(hidden.dtype)",
    ),
    _fault(
        "quantized-logits-sums-rounded",
        "Logits are rounded to the model's dtype before their bias is added.",
        "biases added by what follows a kernel of the model's dtype",
        _QUANTIZED,
        "out = quantized_product(hidden.float(), weight, None).to(hidden.dtype).float()\n"
        "        return out if bias is None else out + bias.float()",
    ),
    _fault(
        "quantized-logits-bias-dropped",
        "The bias is left out.",
        "biases of output matrices ignored by a back end",
        _QUANTIZED,
        _QUANTIZED.replace("bias", "None"),
    ),
    _fault(
        "quantized-logits-scale-of-the-next-token",
        "Every token's logit is multiplied by its neighbour's scale.",
        "scales permuted apart from the rows they belong to",
        _QUANTIZED,
        "weight = QuantizedWeight(weight.scheme, weight.codes, weight.scales.roll(1, 0), weight.zeros)\n"
        f"        {_QUANTIZED}",
    ),
    _fault(
        "quantized-logits-hidden-not-rounded",
        "Hidden rows keep their dtype where codes are asked for.",
        "the output matrix served by the kernel of another scheme",
        _QUANTIZED,
        "scheme = type(weight.scheme)(weight.scheme.bits, weight.scheme.group_size, weight.scheme.zero_points)\n"
        "        weight = QuantizedWeight(scheme, weight.codes, weight.scales, weight.zeros)\n"
        f"        {_QUANTIZED}",
    ),
    _fault(
        "quantized-logits-nan-spreads",
        "A row that is not finite makes every row NaN.",
        "scratch memory of other rows multiplied by zero",
        _QUANTIZED,
        "out = quantized_product(hidden.float(), weight, bias)\n        return out + 0.0 * out.sum(0)",
    ),
    _fault(
        "quantized-logits-single-row-left",
        "A single row is left to quantized_linear, more are not.",
        "kernels that decline some shapes",
        _QUANTIZED,
        f"{_QUANTIZED} if len(hidden) != 1 else None",
    ),
    _fault(
        "quantized-logits-strides-ignored",
        "Hidden rows are read as if they were dense.",
        "wrong stride of a view into a batch",
        _QUANTIZED,
        "dense = torch.as_strided(hidden, hidden.shape, (hidden.shape[1], 1))\n"
        "        return quantized_product(dense.float(), weight, bias)",
    ),
    _fault(
        "quantized-logits-hidden-overwritten",
        "Hidden states of float32 are overwritten with zeros.",
        "scratch memory shared with an argument",
        _QUANTIZED,
        "wide = hidden.float()\n        out = quantized_product(wide, weight, bias)\n"
        "        wide.zero_()\n        return out",
    ),
)

MUTANTS = (*_OF_NUMBERS, *_OF_CODES)
"""Every fault of logits."""
