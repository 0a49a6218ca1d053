"""Keep answers in their form: exclude the tokens that a request's grammar does not allow next.

Masks are computed on the host when logits are sampled from. Where the device works asynchronously that is while it
still computes the step, and since the tokens of earlier steps are known by then, steps may be planned ahead as ever.
"""

from itertools import groupby

import numpy as np
import torch

from zif.contract import Grammars, GrammarState, HostArray, RequestStart
from zif.runtime.logit_rules import LogitRule
from zif.runtime.tokens import SamplePositions


class GrammarMasks(LogitRule[GrammarState]):
    """`structured`: only tokens that the form of the answer allows.

    A request that is started again, after preemption, begins anew and follows all of its output.
    """

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        super().__init__(max_rows, vocab_size)
        self._grammars: Grammars | None = None
        self._num_words = (vocab_size + 31) // 32

    def attach(self, grammars: Grammars) -> None:
        """Take what makes states out of forms; called before the first request with a form."""
        self._grammars = grammars

    def read(self, start: RequestStart) -> GrammarState | None:
        form = start.sampling.structured
        if form is None:
            return None
        assert self._grammars is not None, "a request has a form and no grammars are attached"
        return self._grammars.begin(form)

    def apply(self, logits: torch.Tensor, positions: SamplePositions) -> None:
        held = self.held_by(positions.rows)
        masks = np.empty((len(held), self._num_words), dtype=np.int32)
        # A row comes once for the end of its known tokens and once for each guess, one after the other.
        for _, places in groupby(range(len(held)), key=lambda place: int(positions.rows[held[place][0]])):
            span = list(places)
            first, last = held[span[0]][0], held[span[-1]][0]
            self._fill(held[span[0]][1], positions, (first, last), masks[span[0] : span[-1] + 1])
        forbidden = _forbidden(masks, logits)
        if len(held) == len(logits):
            logits.masked_fill_(forbidden, -torch.inf)
            return
        at = torch.tensor([index for index, _ in held], device=logits.device)
        logits[at] = logits[at].masked_fill_(forbidden, -torch.inf)

    def fault(self, row: int) -> str | None:
        state = self._values.get(row)
        return None if state is None else state.fault

    def _fill(self, state: GrammarState, positions: SamplePositions, ends: tuple[int, int], masks: HostArray) -> None:
        """Bring a state up to date and write its masks. `ends` are the first and last position of its row."""
        first, last = ends
        begin = int(positions.table.num_prompt_tokens[positions.rows[first]]) + state.num_followed
        num_known = int(positions.num_tokens[first])
        state.follow(positions.tokens_between(first, begin, num_known))
        state.fill_masks(positions.tokens_between(first, num_known, int(positions.num_tokens[last])), masks)


def _forbidden(masks: HostArray, logits: torch.Tensor) -> torch.Tensor:
    """Return where the bits are not set, on the device of the logits. masks: [R, W], int32. Returns [R, V], bool."""
    octets = masks.view(np.uint8)
    forbidden = _unset_here(octets) if logits.device.type == "cpu" else _unset_there(octets, logits.device)
    return forbidden[:, : logits.shape[1]]


def _unset_here(octets: HostArray) -> torch.Tensor:
    """Unpack on the host, which is fastest for logits that lie there: tens of microseconds for 150,000 tokens."""
    return torch.from_numpy(np.unpackbits(~octets, bitorder="little", axis=1).view(np.bool_))


def _unset_there(octets: HostArray, device: torch.device) -> torch.Tensor:
    """Unpack on the device: an eighth of the bytes cross."""
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
    return (torch.from_numpy(octets).to(device).unsqueeze(-1) & bits).flatten(1) == 0
