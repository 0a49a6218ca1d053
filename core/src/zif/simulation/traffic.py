"""Requests as users would send them, drawn from a seed: shared stems, conversations, samples, priorities, tenants."""

import random

from zif.contract import CacheKey, Request, Retention, SamplingParams
from zif.simulation.scenario import VOCAB_SIZE, Scenario

_MAX_ENDED = 8
_MEDIA = ("", "a", "bb")
_MEDIA_TOKENS = 5


class TrafficGenerator:
    """Draw the requests of one scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self._shape = scenario.traffic
        self._random = random.Random(f"traffic:{scenario.seed}")
        self._num_pending = scenario.traffic.num_arrivals
        self._num_drawn = 0
        self._stems = [self._tokens(self._shape.max_stem) for _ in range(self._shape.num_stems)]
        self._num_live = 0
        self._ended: list[Request] = []
        self._listens = any(spec.counts_encoder_tokens for spec in scenario.specs)

    @property
    def exhausted(self) -> bool:
        """Say whether nothing more will arrive."""
        return self._num_pending == 0

    def arrivals(self, now_s: float) -> list[Request]:
        """Draw what arrives before the next step; samples of one prompt come together."""
        drawn: list[Request] = []
        while self._num_pending and self._is_open and self._random.random() < self._shape.arrival_rate:
            self._num_pending -= 1
            arrived = self._draw(now_s)
            self._num_live += len(arrived)
            drawn += arrived
        return drawn

    def heed(self, request: Request) -> None:
        """Remember a request that has ended: later ones may continue it, or come in its place."""
        self._num_live -= 1
        self._ended = [*self._ended[1 - _MAX_ENDED :], request]

    @property
    def _is_open(self) -> bool:
        return self._shape.max_live is None or self._num_live < self._shape.max_live

    def _draw(self, now_s: float) -> tuple[Request, ...]:
        chance, shape = self._random, self._shape
        prompt, key = self._prompt()
        patience_s = chance.choice(shape.deadlines_s)
        fields = {
            "sampling": SamplingParams(prompt_logprobs=chance.choice((None,) * 15 + (1,))),
            "max_total_tokens": len(prompt) + chance.randrange(1, shape.max_output + 1),
            "stop_ids": frozenset(chance.choice(((), (), (chance.randrange(VOCAB_SIZE),)))),
            "cache_key": key,
            "num_encoder_tokens": _MEDIA_TOKENS * sum(map(len, key.media)),
            "priority": chance.randrange(shape.num_priorities),
            "tenant": chance.choice(shape.tenants),
            "retention": chance.choice(((), (), (), (self._retention(),))),
            "deadline_s": None if patience_s is None else now_s + patience_s,
        }
        siblings = tuple(self._request(prompt, fields) for _ in range(chance.choice(shape.sample_counts)))
        for request in siblings:
            request.siblings = siblings if len(siblings) > 1 else ()
        return siblings

    def _retention(self) -> Retention:
        chance = self._random
        return Retention(chance.randrange(101), 0, chance.choice((None, 9)), chance.choice((None, 0.1)))

    def _request(self, prompt: list[int], fields: dict[str, object]) -> Request:
        number = self._num_drawn
        self._num_drawn += 1
        return Request(number, prompt.copy(), len(prompt), arrival=number, **fields)  # type: ignore[arg-type]

    def _prompt(self) -> tuple[list[int], CacheKey]:
        """Begin with part of a stem, or with all that an earlier request said."""
        chance, shape = self._random, self._shape
        media = (chance.choice(_MEDIA),) if self._listens else ()
        key = CacheKey(salt=chance.choice(shape.salts), media=media)
        tail = self._tokens(chance.randrange(shape.max_tail + 1))
        if chance.random() < shape.continued_share and self._ended:
            earlier = chance.choice(self._ended)
            return earlier.token_ids[: shape.max_stem] + tail, earlier.cache_key
        return chance.choice(self._stems)[: chance.randrange(1, shape.max_stem + 1)] + tail, key

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(VOCAB_SIZE) for _ in range(count)]
