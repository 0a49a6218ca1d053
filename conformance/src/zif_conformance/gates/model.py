"""G7, model: teacher-forced logits of a small model stay near those of float64, and so does the choice of a token."""

import torch

from zif_conformance.gates.result import GateResult

_MARGIN = 4.0
_FACTOR = 2.0


def model_top1(logits: torch.Tensor, exact: torch.Tensor, declared: torch.Tensor) -> GateResult:
    """Count the positions whose best token differs though its lead exceeds 4 times the reference's logit error.

    All [T, V]; `declared` is the reference in the declared dtypes.
    """
    lead = exact.double().topk(2, dim=-1).values
    decided = lead[:, 0] - lead[:, 1] > _MARGIN * (declared.double() - exact).abs().amax(-1)
    differs = logits.detach().cpu().argmax(-1) != exact.argmax(-1)
    wrong = (decided & differs).nonzero().flatten().tolist()
    where = (
        f"best token at positions {wrong[:8]}" if wrong else f"{int(decided.sum())} decided of {len(exact)} positions"
    )
    return GateResult("G7", float(len(wrong)), 0.0, where)


def model_divergence(logits: torch.Tensor, exact: torch.Tensor, declared: torch.Tensor) -> GateResult:
    """Compare the mean divergence from float64 with twice that of the reference, plus one step of float32."""
    limit = _FACTOR * _divergence(declared, exact) + torch.finfo(torch.float32).eps
    return GateResult(
        "G7", _divergence(logits.detach().cpu(), exact), limit, f"mean divergence of {len(exact)} positions"
    )


def _divergence(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of the softmax of `logits` from that of `exact`."""
    log_exact = exact.double().log_softmax(-1)
    by_position = (log_exact.exp() * (log_exact - logits.double().log_softmax(-1))).sum(-1)
    return float(by_position.mean().nan_to_num(nan=torch.inf))
