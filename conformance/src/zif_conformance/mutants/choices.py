"""Faults of choosing tokens (L2): greedy rows, filters, draws."""

from zif_conformance.mutants.bank import Edit, Mutant


def _fault(name: str, broken: str, origin: str, before: str, after: str) -> Mutant:
    return Mutant(f"choice-{name}", "L2", broken, origin, (Edit("operators.py", before, after),))


_GREEDY = "token_ids = logits.argmax(dim=-1)"
_PEAKS = "peaks = logits.amax(dim=-1)"
_OPTIONS = "_drawn(logits[row], options.part(row, row + 1))"
_SCORES = "scores = (logits - logits.max()) / float(options.temperature[0])"
_MIN_P = "likelihoods = likelihoods.where(likelihoods >= float(options.min_p[0]), 0.0)"
_TOP_K = ".where(scores >= ordered[last], 0)"

_TOP_P = "weights = weights.where(scores >= ordered[int(reached.int().argmax())], 0)"
_DRAW = "return int((weights.cumsum(0) <= goal).sum())"

MUTANTS = (
    _fault(
        "greedy-last-of-equals",
        "The most likely token is the highest id among equals.",
        "reductions that merge partial results from the end",
        _GREEDY,
        "token_ids = logits.shape[-1] - 1 - logits.flip(-1).argmax(dim=-1)",
    ),
    _fault(
        "greedy-rows-drawn",
        "Rows of temperature 0 are drawn at a very small temperature.",
        "greedy decoding as sampling with a small epsilon",
        "options.temperature > 0)).nonzero()",
        "options.temperature >= 0)).nonzero()",
    ),
    _fault(
        "nan-hidden",
        "The largest logit of a row with a NaN is the largest of the others.",
        "maximum instructions that ignore NaN",
        _PEAKS,
        "peaks = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(dim=-1)",
    ),
    _fault(
        "first-row-for-all",
        "Every row is drawn with the options of the first.",
        "options of a batch broadcast from one request",
        _OPTIONS,
        "_drawn(logits[row], options.part(0, 1))",
    ),
    _fault(
        "temperature-ignored",
        "Logits are not divided by the temperature.",
        "an option accepted and ignored",
        _SCORES,
        "scores = logits - logits.max()",
    ),
    _fault(
        "maximum-not-subtracted",
        "Logits are divided by the temperature without their maximum going to zero first.",
        "overflow of an exponential",
        _SCORES,
        "scores = logits / float(options.temperature[0])",
    ),
    _fault(
        "min-p-of-total",
        "min_p is a share of all probability instead of the most likely token's.",
        "two readings of min_p",
        _MIN_P,
        "likelihoods = likelihoods.where(likelihoods >= float(options.min_p[0]) * likelihoods.sum(), 0.0)",
    ),
    _fault(
        "top-k-one-more",
        "top_k keeps one token more than k.",
        "off-by-one of a threshold",
        "last = min(int(options.top_k[0]), len(scores)) - 1",
        "last = min(int(options.top_k[0]) + 1, len(scores)) - 1",
    ),
    _fault(
        "top-k-cuts-ties",
        "Of tokens that tie with the k-th only some are kept.",
        "top-k by a sort that cuts after k places",
        _TOP_K,
        ".where(torch.zeros_like(scores).index_fill(0, order[: last + 1], 1.0) > 0, 0)",
    ),
    _fault(
        "top-p-of-all",
        "top_p takes its share of the weight before top_k.",
        "filters applied side by side instead of one after the other",
        "_share(int(weights.sum()), int(float(options.top_p[0]) * 2.0**62))",
        "_share(int((likelihoods * 2.0**40).long().sum()), int(float(options.top_p[0]) * 2.0**62))",
    ),
    _fault(
        "top-p-without-border",
        "The token that reaches the share is dropped.",
        "exclusive and inclusive sums mixed up",
        _TOP_P,
        "weights = weights.where((scores > ordered[int(reached.int().argmax())]) | (scores == 0), 0)",
    ),
    _fault(
        "top-p-cuts-ties",
        "Of tokens that tie with the last one of the share only some are kept.",
        "nucleus by a sort that cuts after the share is reached",
        _TOP_P,
        "kept = order[: int(reached.int().argmax()) + 1]\n"
        "        weights = weights.where(torch.zeros_like(scores).index_fill(0, kept, 1.0) > 0, 0)",
    ),
    _fault(
        "drawn-by-rank",
        "The running sum goes from the most likely token down instead of by token id.",
        "draws over sorted probabilities",
        _DRAW,
        "return int(order[int((weights[order].cumsum(0) <= goal).sum())])",
    ),
    _fault(
        "end-included",
        "A running sum equal to the goal ends the search one token early.",
        "half-open intervals closed at the wrong end",
        _DRAW,
        "return min(int((weights.cumsum(0) < goal).sum()), len(weights) - 1)",
    ),
    _fault(
        "fraction-rounded",
        "Random numbers are rounded to float32 first.",
        "uniform random numbers in single precision",
        "_share(int(weights.sum()), int(options.fractions[0]))",
        "int(float(torch.tensor(options.fractions[0] / 2**62).float()) * int(weights.sum()))",
    ),
    _fault(
        "logits-overwritten",
        "Logits are divided in place.",
        "an in-place kernel behind an interface that leaves arguments alone",
        _SCORES,
        "scores = logits.sub_(logits.max().clone()).div_(float(options.temperature[0]))",
    ),
)
"""Every fault of choosing tokens."""
