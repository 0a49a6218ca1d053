"""Where one request stands in its grammar: `zif.contract.GrammarState` over a matcher of llguidance."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zif.contract import GrammarState, HostArray

if TYPE_CHECKING:
    import llguidance

MAX_REASON_CHARACTERS = 300
GRACE_S = 0.5
TOKEN_S = 0.005
"""A request may take this much of the processor for its form: once, and for each token. Ordinary forms take a tenth of
it and less; an ambiguous grammar grows dearer with each token, and ends before it holds up the others for long."""
ANY_TOKEN = -1
"""A word of a mask that allows its 32 tokens."""


@dataclass(frozen=True, slots=True)
class MaskShape:
    """What a matcher's masks cover: `num_words` of 32 tokens. A model's logits may be narrower than its tokenizer.

    `eos_ids` end an answer; no matcher follows them.
    """

    num_words: int
    eos_ids: frozenset[int]


class MatcherState(GrammarState):
    """Takes over `matcher`, a copy of a compiled one that has followed nothing yet."""

    def __init__(self, matcher: "llguidance.LLMatcher", shape: MaskShape) -> None:
        self._matcher = matcher
        self._shape = shape
        self._num_followed = 0
        self._spent_s = 0.0

    @property
    def num_followed(self) -> int:
        return self._num_followed

    @property
    def fault(self) -> str | None:
        if self._is_too_slow():
            return f"the form of the answer took {self._spent_s:.2f} s to follow so far; give a simpler one"
        if self._matcher.is_error():
            reason = reason_of(self._matcher) or "nothing matches"
            return f"the form of the answer cannot be followed: {reason}; give a simpler one"
        return None

    def follow(self, token_ids: Sequence[int]) -> None:
        if token_ids and not self._is_too_slow():
            began = time.thread_time()
            self._matcher.consume_tokens(list(token_ids))
            self._spent_s += time.thread_time() - began
        self._num_followed += len(token_ids)

    def fill_masks(self, guesses: Sequence[int], masks: HostArray) -> None:
        masks[:] = 0
        if not self._is_too_slow():
            began = time.thread_time()
            self._fill(guesses, masks)
            self._spent_s += time.thread_time() - began

    def _is_too_slow(self) -> bool:
        return self._spent_s > GRACE_S + TOKEN_S * self._num_followed

    def _fill(self, guesses: Sequence[int], masks: HostArray) -> None:
        matcher, num_guessed = self._matcher, 0
        for guess in (*guesses, None):
            masks[num_guessed] = mask_of(matcher, self._shape.num_words)[: masks.shape[1]]
            if guess is None or matcher.is_error():
                break
            # Nothing follows an end, so what is allowed there does not matter.
            if guess in self._shape.eos_ids or not matcher.validate_tokens([guess]):
                masks[num_guessed + 1 :] = ANY_TOKEN
                break
            matcher.consume_token(guess)
            num_guessed += 1
        if num_guessed and not matcher.is_error():
            matcher.rollback(num_guessed)


class FaultyState(GrammarState):
    """The state of a form that cannot be compiled: it allows no token and says why."""

    def __init__(self, fault: str) -> None:
        self._fault = fault
        self._num_followed = 0

    @property
    def num_followed(self) -> int:
        return self._num_followed

    @property
    def fault(self) -> str | None:
        return self._fault

    def follow(self, token_ids: Sequence[int]) -> None:
        self._num_followed += len(token_ids)

    def fill_masks(self, guesses: Sequence[int], masks: HostArray) -> None:
        masks[:] = 0


def mask_of(matcher: "llguidance.LLMatcher", num_words: int) -> HostArray:
    """Return which tokens may come next: [num_words], int32. All zero when the matcher failed."""
    mask = np.zeros(num_words, dtype=np.int32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    if matcher.is_error():
        mask[:] = 0
    return mask


def reason_of(matcher: "llguidance.LLMatcher") -> str:
    """Return why a matcher failed, on one line and short; empty when it did not, or found that nothing matches."""
    text = matcher.get_error().removeprefix("NoExtensionBias").replace("<non-verbose/>", "")
    return " ".join(text.split())[:MAX_REASON_CHARACTERS]
