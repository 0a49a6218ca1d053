"""Hidden states of requests that want them in place of tokens, from the device into a step's result.

The torch runner is the only caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from zif.contract import StepResult
from zif.runtime.tokens import Int64

HIDDEN_FAULT = "the model's hidden state is not finite; the prompt drives it out of the range of the model's dtype"


@dataclass(frozen=True, slots=True)
class WantedRows:
    """The rows of one request. tokens: [N], int64, indices of the step's tokens."""

    request_id: int
    tokens: Int64


def report_hidden(wanted: Sequence[WantedRows], hidden: torch.Tensor, result: StepResult) -> None:
    """Put rows of `hidden` into `result`; a request with one that is not finite gets a fault.

    hidden: [T, C], the final normed hidden states of the step's tokens.
    """
    if not wanted:
        return
    tokens = torch.from_numpy(np.concatenate([rows.tokens for rows in wanted])).to(hidden.device)
    found = hidden.index_select(0, tokens).float().cpu().numpy().astype("<f4", copy=False)
    ends = np.cumsum([len(rows.tokens) for rows in wanted])
    for rows, part in zip(wanted, np.split(found, ends[:-1]), strict=True):
        if np.isfinite(part).all():
            result.hidden[rows.request_id] = part.tobytes()
        else:
            result.faults.setdefault(rows.request_id, HIDDEN_FAULT)
            result.unsound.add(rows.request_id)
