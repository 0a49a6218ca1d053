"""Requests of a sampler under test, without engine and model."""

from dataclasses import dataclass, field

import numpy as np
import torch

from zif.contract import OpTable
from zif.contract.sampling import SamplingParams
from zif.contract.step import RequestStart
from zif.runtime.sampler import SampledTokens, Sampler
from zif.runtime.tokens import SamplePositions, TokenTable


@dataclass(frozen=True)
class SampledRequest:
    """A request that stands before its next token."""

    params: SamplingParams
    prompt: list[int] = field(default_factory=lambda: [1, 2, 3])
    output: list[int] = field(default_factory=list)
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()

    def start(self, request_id: int) -> RequestStart:
        return RequestStart(
            request_id,
            self.prompt + self.output,
            len(self.prompt),
            (),
            self.params,
            self.seed,
            self.stop_ids,
            self.bad_words_ids,
        )


class SampledBatch:
    """A sampler and a token table that hold `requests`, request i in row `rows[i]`. `ops` are asked to choose."""

    def __init__(
        self,
        requests: list[SampledRequest],
        vocab_size: int,
        rows: list[int] | None = None,
        ops: OpTable | None = None,
    ) -> None:
        self.rows = np.array(range(len(requests)) if rows is None else rows, dtype=np.int64)
        max_rows = int(self.rows.max(initial=0)) + 1
        self.sampler = Sampler(max_rows, vocab_size, "cpu", ops)
        self.tokens = TokenTable(max_rows, capacity=4)
        for row, request in zip(self.rows.tolist(), requests, strict=True):
            self.tokens.set_row(row, request.prompt + request.output, len(request.prompt))
            self.sampler.add(row, request.start(row))

    def sample(self, logits: torch.Tensor) -> SampledTokens:
        """Sample each request once. logits: [number of requests, V]; left as they are."""
        return self.sampler.sample(
            logits.clone(), SamplePositions(self.tokens, self.rows, self.tokens.num_tokens[self.rows])
        )

    def append(self, token_ids: list[int]) -> None:
        """Make one more token of each request known."""
        self.tokens.put(self.rows, self.tokens.num_tokens[self.rows], token_ids)

    def step(self, logits: torch.Tensor) -> list[int]:
        """Sample each request once and append the tokens."""
        token_ids = self.sample(logits).token_ids
        self.append(token_ids)
        return token_ids


def sample_one(request: SampledRequest, logits: torch.Tensor) -> int:
    """Sample one request alone. logits: [V]."""
    batch = SampledBatch([request], len(logits))
    result = batch.sample(logits.unsqueeze(0))
    assert not result.faults, result.faults
    return result.token_ids[0]
