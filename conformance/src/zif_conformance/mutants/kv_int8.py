"""Faults of keys and values held as codes (L3): how vectors are rounded, which scale they have, where it lies."""

from zif_conformance.mutants.bank import Edit, Mutant


def _fault(name: str, broken: str, origin: str, *changes: str) -> Mutant:
    edits = tuple(Edit("codes.py", *pair) for pair in zip(changes[::2], changes[1::2], strict=True))
    return Mutant(f"codes-{name}", "L3", broken, origin, edits)


_LARGEST = "largest = vectors.abs().amax(dim=-1, keepdim=True)"
_SCALES = "scales = largest / _LARGEST"
_STEPS = "steps = (vectors / scales).masked_fill(largest == 0, 0.0)"
_CODES = "codes = steps.masked_fill(~finite, 0.0).round().clamp(-_LARGEST, _LARGEST)"
_RESULT = "return codes.to(torch.int8), scales.masked_fill(~finite, torch.nan)"
_READ_SCALES = "scales = rows[..., -_SCALE_BYTES:].contiguous().view(torch.float32)"
_READ = "return rows[..., : self._head_dim].float() * scales"
_WRITTEN_CODES = "rows[..., : self._head_dim] = codes"
_WRITTEN_SCALES = "rows[..., -_SCALE_BYTES:] = scales.view(torch.int8)"
_INIT = "self._head_dim = head_dim"

_ROUNDING = (
    _fault(
        "truncated",
        "Codes are cut instead of rounded.",
        "casts that truncate",
        _CODES,
        _CODES.replace("round", "trunc"),
    ),
    _fault(
        "ties-away-from-zero",
        "Halves go away from zero.",
        "rounding modes of a C library",
        _CODES,
        _CODES.replace(".round()", ".add(steps.sign() * 0.5).trunc()"),
    ),
    _fault(
        "reciprocal",
        "Vectors are multiplied with one over the scale.",
        "divisions that a compiler or an author made products of",
        _STEPS,
        _STEPS.replace("vectors / scales", "vectors * (1 / scales)"),
    ),
    _fault(
        "scale-of-128",
        "The largest element is held as 128, and cut.",
        "the asymmetry of 8-bit integers",
        _SCALES,
        "scales = largest / 128",
    ),
    _fault(
        "scale-of-signed-largest",
        "The scale is that of the largest element, not of the largest absolute value.",
        "a missing absolute value",
        _LARGEST,
        "largest = vectors.amax(dim=-1, keepdim=True).abs()",
    ),
    _fault(
        "scale-in-half",
        "Scales go through bfloat16.",
        "scales kept in the dtype of the model",
        _SCALES,
        "scales = (largest / _LARGEST).bfloat16().float()",
    ),
    _fault(
        "read-rounded",
        "What is read goes through bfloat16.",
        "codes widened to the dtype of the model",
        _READ,
        "return (rows[..., : self._head_dim].float() * scales).bfloat16().float()",
    ),
    _fault(
        "not-finite-is-zero",
        "A vector with an element that is not finite becomes zeros.",
        "conversions of NaN to integers",
        _RESULT,
        "return codes.to(torch.int8), scales.masked_fill(~finite, 0.0)",
    ),
    _fault(
        "infinity-is-large",
        "Infinities are held as the largest finite element of their vector.",
        "saturating conversions",
        _LARGEST,
        "finite = vectors.masked_fill(vectors.isinf(), 0.0)\n    limit = finite.abs().amax(dim=-1, keepdim=True)\n"
        "    vectors = torch.where(vectors.isinf(), vectors.sign() * limit, vectors)\n    " + _LARGEST,
    ),
)

_PLACES = (
    _fault(
        "scale-of-token",
        "All heads of a token share a scale.",
        "one scale for several vectors",
        _LARGEST,
        "largest = vectors.abs().amax(dim=(-2, -1), keepdim=True).expand(*vectors.shape[:-1], 1).contiguous()",
    ),
    _fault(
        "scale-of-step",
        "All tokens of a step share a scale.",
        "dynamic scales of a whole batch",
        _LARGEST,
        "largest = vectors.abs().amax(dim=(0, -1), keepdim=True).expand(*vectors.shape[:-1], 1).contiguous()",
    ),
    _fault(
        "scale-of-neighbouring-head",
        "A head's codes are multiplied with the scale of the head before.",
        "strides of scales",
        _READ,
        _READ.replace("* scales", "* scales.roll(1, -2)"),
    ),
    _fault(
        "values-with-scales-of-keys",
        "Values are multiplied with the scales of their keys.",
        "one pointer to scales for two caches",
        _READ,
        "scales = scales[..., :1, :, :].expand_as(scales)\n        " + _READ,
    ),
    _fault(
        "scales-beside-the-arena",
        "Scales lie in memory of their own, which copies of blocks leave behind.",
        "tiers and swapping that move the blocks alone",
        _INIT,
        _INIT + "\n        self._scales = torch.full((*rows.shape[:-1], 1), torch.nan)",
        _READ_SCALES,
        "scales = self._scales[place]",
        _WRITTEN_SCALES,
        _WRITTEN_SCALES + "\n        self._scales[place] = scales",
    ),
    _fault(
        "scale-over-the-last-codes",
        "The scale is written where the last codes are.",
        "rows without room for the scale",
        _WRITTEN_CODES,
        _WRITTEN_CODES + "\n        first = self._head_dim - _SCALE_BYTES\n"
        "        rows[..., max(0, first) : self._head_dim] = scales.view(torch.int8)[..., max(0, -first) :]",
    ),
    _fault(
        "tail-of-head-not-coded",
        "Head sizes that are no multiple of 16 lose their last codes.",
        "vector loops without a tail",
        _WRITTEN_CODES,
        _WRITTEN_CODES + "\n        rows[..., self._head_dim // 16 * 16 : self._head_dim] = 0",
    ),
)

MUTANTS = (*_ROUNDING, *_PLACES)
"""Every fault of keys and values held as codes."""
