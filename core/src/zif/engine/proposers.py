"""Who guesses the next tokens of a request, so that one step can check several of them.

Not here: which guesses are right (the runner), and how many a step has room for (the scheduler). The engine asks the
proposer once per step for each request that generates, and tells it when a request has ended.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from zif.contract import EngineConfig, ModelRunner, Request
from zif.errors import ConfigError

MIN_NGRAM = 2
MAX_NGRAM = 4
"""The lengths of what is looked up. One token says too little of what follows; four nearly always say enough."""

_TOKEN_BITS = 32


class DraftProposer(ABC):
    """Guess what requests will go on with. Guesses may be wrong: that costs time, never changes a token."""

    @abstractmethod
    def propose(self, request: Request) -> list[int]:
        """Return guesses of the tokens after the known ones, the next one first; empty when there is nothing to say."""

    def forget(self, request: Request) -> None:  # noqa: B027 - nothing to forget without memory
        """Drop what is kept of a request that has ended. Harmless for one that is unknown."""


@dataclass(slots=True)
class _NgramIndex:
    """Where each n-gram of one request's tokens was last followed by something.

    `followers[i]` maps an n-gram of the i-th length, packed into one integer, to the index of the token that followed
    its last occurrence. `recent` are the last tokens, packed, as many as the longest n-gram has; the n-grams that end
    there are not in the maps yet, because nothing has followed them.
    """

    followers: list[dict[int, int]]
    recent: int = 0
    num_seen: int = 0


class NgramProposer(DraftProposer):
    """Guess that what followed the last few tokens before follows them again.

    Looks up the longest suffix of `min_ngram` to `max_ngram` known tokens that occurred earlier, and copies what came
    after its last occurrence; where that runs into the end of the text, it goes on with its own guesses, so that a
    period repeats. Source: Saxena, "Prompt Lookup Decoding", 2023; the overlapping copy: Ziv and Lempel, 1977.

    An index per request grows with its tokens: a step costs a few dictionary operations, however long the context. It
    takes at most about 100 bytes per token and length of n-gram.
    """

    def __init__(self, num_draft_tokens: int, min_ngram: int = MIN_NGRAM, max_ngram: int = MAX_NGRAM) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ConfigError(f"min_ngram={min_ngram!r} must lie between 1 and max_ngram={max_ngram!r}")
        if num_draft_tokens < 1:
            raise ConfigError(f"num_draft_tokens={num_draft_tokens!r} proposes nothing; give 1 or more")
        self._num_draft_tokens = num_draft_tokens
        self._masks = [(1 << _TOKEN_BITS * n) - 1 for n in range(min_ngram, max_ngram + 1)]
        self._min_ngram = min_ngram
        self._indices: dict[int, _NgramIndex] = {}

    def propose(self, request: Request) -> list[int]:
        index = self._indices.get(request.request_id)
        if index is None:
            index = self._indices[request.request_id] = _NgramIndex([{} for _ in self._masks])
        self._extend(index, request.token_ids)
        start = self._longest_match(index)
        return [] if start is None else _copy(request.token_ids, start, self._num_draft_tokens)

    def forget(self, request: Request) -> None:
        self._indices.pop(request.request_id, None)

    def _extend(self, index: _NgramIndex, token_ids: list[int]) -> None:
        """Take in the tokens that became known since the last call."""
        lengths = list(enumerate(zip(index.followers, self._masks, strict=True), start=self._min_ngram))
        recent, widest = index.recent, self._masks[-1]
        for position, token_id in enumerate(token_ids[index.num_seen :], start=index.num_seen):
            for n, (followers, mask) in lengths:
                if n > position:
                    break
                followers[recent & mask] = position
            recent = (recent << _TOKEN_BITS | token_id) & widest
        index.recent, index.num_seen = recent, len(token_ids)

    def _longest_match(self, index: _NgramIndex) -> int | None:
        """Return where the text goes on after the last occurrence of its longest known suffix."""
        longest = index.num_seen - self._min_ngram + 1
        for i in reversed(range(min(longest, len(self._masks)))):
            start = index.followers[i].get(index.recent & self._masks[i])
            if start is not None:
                return start
        return None


def make_proposer(config: EngineConfig, runner: ModelRunner) -> DraftProposer | None:
    """Return the proposer that the settings ask for. Raises `ConfigError` when the runner cannot verify drafts."""
    if config.speculation == "off":
        return None
    if config.speculation != "ngram":
        raise ConfigError(f"speculation={config.speculation!r} is none of 'off', 'ngram'; choose one of these")
    if not runner.verifies_drafts:
        raise ConfigError(
            f"speculation={config.speculation!r} needs a model runner that verifies drafts, and "
            f"{type(runner).__name__} does not; choose speculation='off' or another platform"
        )
    return NgramProposer(config.max_draft_tokens)


def set_drafts(proposer: DraftProposer, requests: Iterable[Request]) -> None:
    """Give guesses to the requests that lack one known token only, all of whose steps have been applied."""
    for request in requests:
        if request.num_output_tokens and not request.num_pending_tokens and not request.finished:
            lacks_one = request.num_tokens - request.num_planned_tokens == 1
            request.draft_token_ids = proposer.propose(request) if lacks_one else []


def _copy(token_ids: list[int], start: int, count: int) -> list[int]:
    """Copy `count` tokens from `start` on, the copy itself being what follows the end of the text."""
    copied = token_ids[start : start + count]
    period = len(token_ids) - start
    while len(copied) < count:
        copied.append(copied[len(copied) - period])
    return copied
