"""Faults of matrices in a form of the platform's own (L2), and right forms.

The reference platform has none, so each brings one: a method that its operators lack, and what is broken in it.
"""

from zif_conformance.mutants.bank import Edit, Mutant, Variant

_FILE = "operators.py"
_AFTER = "    def choose_tokens(self, logits: torch.Tensor, options: DrawOptions) -> ChosenTokens:\n"
_LINEAR = "return _linear(x.float(), weight, bias).to(x.dtype)"
_PRODUCT = "product = x @ weight.float().T"
_GATED = "return _gated(gate_up, activation).to(x.dtype)"
_LOGITS = "return _linear(hidden.float(), weight, bias)"
_COPY = """\
form = allocate(weight.nbytes).view(weight.dtype).view(weight.shape)
form.prepared = True
form.copy_(weight)
return form
"""
"""The simplest form of all: a copy, which can be told from a matrix."""
_IS_FORM = 'hasattr(weight, "prepared")'


def _edits(body: str, changes: tuple[str, ...]) -> tuple[Edit, ...]:
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    method = Edit(_FILE, _AFTER, f"    def prepare_weight(self, weight, allocate):\n{lines}\n{_AFTER}")
    return (method, *(Edit(_FILE, *pair) for pair in zip(changes[::2], changes[1::2], strict=True)))


def _fault(name: str, broken: str, origin: str, body: str, *changes: str) -> Mutant:
    """Return a platform with this `prepare_weight`. changes: what stands elsewhere and what is put there, in turn."""
    return Mutant(f"prepared-{name}", "L2", broken, origin, _edits(body, changes))


def _filled(content: str) -> str:
    """Return the copy with something else in it."""
    return _COPY.replace("copy_(weight)", f"copy_({content})")


def _before_return(lines: str) -> str:
    """Return the copy with something done to it."""
    return _COPY.replace("return form", f"{lines}\nreturn form")


_FORMS = (
    _fault(
        "form-is-the-matrix",
        "What is given in place of a matrix is a view of it.",
        "layouts that need no change passed on without a copy",
        "return weight.view(weight.shape)",
    ),
    _fault(
        "rounded",
        "Weights go through bfloat16.",
        "one packed layout for all dtypes",
        _filled("weight.bfloat16()"),
    ),
    _fault(
        "subnormal-numbers-lost",
        "Subnormal weights become zeros.",
        "conversions that flush subnormal numbers",
        _filled("weight.where(~(weight.abs() < torch.finfo(weight.dtype).tiny), 0.0)"),
    ),
    _fault(
        "infinities-cut",
        "Infinite weights become the largest numbers.",
        "saturating conversions",
        _filled("weight.clamp(torch.finfo(weight.dtype).min, torch.finfo(weight.dtype).max)"),
    ),
    _fault(
        "nan-made-zero",
        "Weights that are no numbers become zeros.",
        "codes without one for NaN",
        _filled("weight.where(~weight.isnan(), 0.0)"),
    ),
    _fault(
        "sign-of-zero-lost",
        "Zeros below zero become zeros above.",
        "codes with one zero",
        _filled("weight + 0.0"),
    ),
    _fault(
        "exponents-of-a-row-cut",
        "Weights far below the largest of their row become zeros.",
        "exponents packed as a distance from the largest",
        _filled("weight.where(~(weight.abs() < weight.abs().amax(-1, keepdim=True) * 2.0**-20), 0.0)"),
    ),
    _fault(
        "exponents-of-a-column-cut",
        "Weights far below the largest of their column become zeros.",
        "exponents packed as a distance from the largest",
        _filled("weight.where(~(weight.abs() < weight.abs().amax(0, keepdim=True) * 2.0**-20), 0.0)"),
    ),
    _fault(
        "exceptions-beyond-room-lost",
        "Of weights above 64, and of what is not finite, all but the first 32 become zeros.",
        "lists of exceptions of a fixed length",
        "odd = ~(weight.abs() <= 64)\n"
        "odd &= odd.flatten().cumsum(0).view(odd.shape) > 32\n" + _filled("weight.where(~odd, 0.0)"),
    ),
    _fault(
        "last-row-lost",
        "The last row is zeros where rows are no multiple of 16.",
        "tails of packed panels",
        _before_return("form[len(form) // 16 * 16 :][-1:] = 0"),
    ),
    _fault(
        "last-inputs-lost",
        "Inputs beyond a multiple of 32 are zeros.",
        "tails of packed panels",
        _before_return("form[:, form.shape[1] // 32 * 32 or form.shape[1] :] = 0"),
    ),
    _fault(
        "strides-ignored",
        "The matrix is read as if it were dense.",
        "wrong stride of a view into a fused weight",
        _filled("weight.as_strided(weight.shape, (weight.shape[1], 1))"),
    ),
)

_MEMORY = (
    _fault(
        "known-by-address",
        "A matrix at an address that was prepared before gets the form of then.",
        "caches by the address of a tensor",
        'forms = vars(self).setdefault("forms", {})\n'
        "key = weight.data_ptr(), weight.shape, weight.dtype\n"
        "if key in forms:\n    return forms[key]\n" + _before_return("forms[key] = form"),
    ),
    _fault(
        "matrix-known-by-address",
        "A product with a matrix that lies where another was prepared is one with that one's form.",
        "caches by the address of a tensor",
        _before_return('vars(self).setdefault("forms", {})[weight.data_ptr(), weight.shape] = form'),
        _LINEAR,
        f'weight = vars(self).get("forms", {{}}).get((weight.data_ptr(), weight.shape), weight)\n        {_LINEAR}',
    ),
    _fault(
        "form-known-by-address",
        "What a product makes of a form is kept for all forms at its address.",
        "caches by the address of a tensor",
        _COPY,
        _LINEAR,
        f"if {_IS_FORM}:\n"
        "            key = weight.data_ptr(), weight.shape, weight.dtype\n"
        '            weight = vars(self).setdefault("wide", {}).setdefault(key, weight.double())\n'
        f"        {_LINEAR}",
    ),
    _fault(
        "memory-lent-once",
        "Forms of one size share the memory that was lent for the first.",
        "one buffer of a layer used for all layers",
        _COPY.replace(
            "form = allocate(weight.nbytes)",
            'lent = vars(self).setdefault("lent", {})\n'
            "if weight.nbytes not in lent:\n    lent[weight.nbytes] = allocate(weight.nbytes)\n"
            "form = lent[weight.nbytes]",
        ),
    ),
    _fault(
        "memory-of-its-own",
        "Forms lie in memory that nobody lent.",
        "packed weights that no plan of memory counts",
        "return weight.clone()",
    ),
    _fault(
        "beyond-its-memory",
        "Sixteen bytes after the memory that was lent are written.",
        "padded panels in memory sized for the matrix",
        "lent = allocate(weight.nbytes)\n"
        "lent.as_strided((len(lent) + 16,), (1,), lent.storage_offset())[len(lent) :] = 0\n"
        + _COPY.replace("allocate(weight.nbytes)", "lent"),
    ),
    _fault(
        "matrix-cleared",
        "The matrix is zeros once it is prepared.",
        "packing in place",
        _before_return("weight.zero_()"),
    ),
    _fault(
        "out-of-memory-means-the-matrix",
        "Without memory for a form, a view of the matrix is given as one.",
        "fallbacks that skip what the main path does",
        "from zif.errors import OutOfMemoryError\n"
        "try:\n"
        "    form = allocate(weight.nbytes).view(weight.dtype).view(weight.shape)\n"
        "except OutOfMemoryError:\n"
        "    return weight.view(weight.shape)\n"
        "return form.copy_(weight)",
    ),
    _fault(
        "half-made-after-out-of-memory",
        "What was begun when memory ran out counts as done.",
        "state that an error leaves behind",
        'begun = vars(self).setdefault("begun", set())\n'
        "done = weight.shape in begun\n"
        "begun.add(weight.shape)\n"
        "form = allocate(weight.nbytes).view(weight.dtype).view(weight.shape)\n"
        "begun.discard(weight.shape)\n"
        "return form if done else form.copy_(weight)",
    ),
)

_PRODUCTS = (
    _fault(
        "bias-dropped",
        "A product with a form leaves out the bias.",
        "biases ignored by one of two kernels",
        _COPY,
        _LINEAR,
        f"bias = None if {_IS_FORM} else bias\n        {_LINEAR}",
    ),
    _fault(
        "strides-of-rows-ignored",
        "A product with a form reads rows as if they were dense.",
        "wrong stride of a view into a fused projection",
        _COPY,
        _LINEAR,
        f"x = x.as_strided(x.shape, (x.shape[1], 1)) if {_IS_FORM} else x\n        {_LINEAR}",
    ),
    _fault(
        "sums-in-another-order",
        "More than 64 rows are summed from the last input to the first where the matrix is a form.",
        "another kernel for many rows",
        _COPY,
        _PRODUCT,
        f"turned = {_IS_FORM} and len(x) > 64\n"
        "    product = x.flip(1) @ weight.float().flip(1).T if turned else x @ weight.float().T",
    ),
    _fault(
        "gated-halves-swapped",
        "The activation of a product with a form is applied to its second half.",
        "order of gates and ups in a packed weight",
        _COPY,
        _GATED,
        f"gate_up = gate_up.roll(gate_up.shape[1] // 2, 1) if {_IS_FORM} else gate_up\n        {_GATED}",
    ),
    _fault(
        "logits-rounded",
        "Logits of a form are rounded to the model's dtype and widened again.",
        "the output matrix run as any other projection",
        _COPY,
        _LOGITS,
        f"out = _linear(hidden.float(), weight, bias)\n"
        f"        return out.to(hidden.dtype).float() if {_IS_FORM} else out",
    ),
    _fault(
        "logits-left",
        "Logits are left to linear where the matrix is a form, and only there.",
        "kernels that decline some layouts",
        _COPY,
        _LOGITS,
        f"return None if {_IS_FORM} else _linear(hidden.float(), weight, bias)",
    ),
    _fault(
        "inner-size-cut",
        "Operands of different inner sizes are cut to the shorter one where the matrix is a form.",
        "shape checks that only a matrix passes",
        _COPY,
        _PRODUCT,
        f"inner = min(x.shape[-1], weight.shape[-1]) if {_IS_FORM} else x.shape[-1]\n"
        "    product = x[..., :inner] @ (weight[:, :inner] if hasattr(weight, 'prepared') else weight).float().T",
    ),
    _fault(
        "odd-rows-cut",
        "A gate without an up is left out where the matrix is a form.",
        "shape checks that only a matrix passes",
        _COPY,
        _GATED,
        f"gate_up = gate_up[:, : gate_up.shape[1] // 2 * 2] if {_IS_FORM} else gate_up\n        {_GATED}",
    ),
    _fault(
        "rows-overwritten",
        "Rows of float32 that a form was multiplied by are zeros.",
        "scratch memory shared with an argument",
        _COPY,
        _LINEAR,
        "out = _linear(x.float(), weight, bias).to(x.dtype)\n"
        f"        if {_IS_FORM}:\n            x.float().zero_()\n        return out",
    ),
)

MUTANTS = (*_FORMS, *_MEMORY, *_PRODUCTS)
"""Every fault of prepared matrices."""


def _variant(name: str, other: str, body: str) -> Variant:
    return Variant(f"variant-prepared-{name}", "L2", other, _edits(body, ()))


VARIANTS = (
    _variant("copied", "Matrices are prepared as copies of themselves.", _COPY),
    _variant(
        "turned",
        "Matrices are prepared as their transpose, in a form that is no array.",
        "from types import SimpleNamespace\n"
        "turned = allocate(weight.nbytes).view(weight.dtype).view(weight.shape[::-1])\n"
        "turned.copy_(weight.T)\n"
        "return SimpleNamespace(float=lambda: turned.T.clone(memory_format=torch.contiguous_format).float())",
    ),
    _variant(
        "in-pieces",
        "Matrices are prepared in pieces of 24 rows, each in memory of its own.",
        "from types import SimpleNamespace\n"
        "pieces = [allocate(rows.nbytes).view(rows.dtype).view(rows.shape).copy_(rows) for rows in weight.split(24)]\n"
        "return SimpleNamespace(float=lambda: torch.cat(pieces).float())",
    ),
    _variant(
        "where-it-pays",
        "Matrices of few rows are left as they are, after memory was lent for them.",
        _before_return("if len(form) < 64:\n    return None"),
    ),
    _variant(
        "where-there-is-memory",
        "Matrices are left as they are where memory runs out.",
        "from zif.errors import OutOfMemoryError\n"
        "try:\n"
        "    form = allocate(weight.nbytes).view(weight.dtype).view(weight.shape)\n"
        "except OutOfMemoryError:\n"
        "    return None\n"
        "return form.copy_(weight)",
    ),
)
"""Right forms of matrices."""
