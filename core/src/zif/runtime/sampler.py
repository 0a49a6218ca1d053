"""Choose the next token of each request from the model's logits.

The options of a request live in columns, one entry per row, so that a step costs no Python per request; only requests
with a bias, word lists, a minimum length, penalties or log-probabilities are visited one by one. The torch runner
owns one `Sampler` and gives it the row numbers of its token table.

Order within a step: logit_bias, allowed_token_ids, bad_words, structured, min_tokens, repetition, frequency and
presence penalties; then greedy rows take the most likely token (the lowest id among equals), the others draw after
temperature, min_p, top_k and top_p. This last choice is the platform's where its operators take it
(`OpTable.choose_tokens`), and the array library's where they do not.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zif.contract import NO_TOKEN_LEFT, ChosenTokens, DrawOptions, Grammars, OpTable, RequestStart, TokenLogprobs
from zif.runtime.drawing import MAX_VOCAB_SIZE, draw_tokens
from zif.runtime.grammar_masks import GrammarMasks
from zif.runtime.logit_rules import AllowedTokens, BadWords, LogitBias, LogitRule, MinTokens
from zif.runtime.logprobs import token_logprobs
from zif.runtime.penalties import Penalties
from zif.runtime.randomness import draw_fractions, stream_state
from zif.runtime.tokens import SamplePositions

RULES: tuple[type[LogitRule[Any]], ...] = (LogitBias, AllowedTokens, BadWords, GrammarMasks, MinTokens, Penalties)
"""In the order in which they apply."""


OPTIONS_FAULT = (
    f"{NO_TOKEN_LEFT}: logit_bias, allowed_token_ids, bad_words, min_tokens and structured exclude all, or "
    "repetition_penalty made the logits overflow; loosen one of these options"
)


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One token per position. `logprobs` and `faults` are keyed by index; a faulty position's token is void.

    `unsound` are the faulty positions whose logits were not finite before any option changed them.
    """

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    unsound: frozenset[int] = frozenset()


class Sampler:
    """Sampling options of up to `max_rows` requests, and the choice of their next tokens.

    `vocab_size` is the width of the logits, `array_device` the torch device that holds them. `ops` are asked to choose
    tokens; without them the array library does.
    """

    def __init__(self, max_rows: int, vocab_size: int, array_device: str, ops: OpTable | None = None) -> None:
        assert 0 < vocab_size <= MAX_VOCAB_SIZE, f"vocab_size={vocab_size!r} is outside (0, {MAX_VOCAB_SIZE}]"
        self._vocab_size = vocab_size
        self._device = torch.device(array_device)
        self._ops = ops
        self._draws = np.zeros(max_rows, dtype=np.bool_)
        self._temperature = np.ones(max_rows, dtype=np.float32)
        self._min_p = np.zeros(max_rows, dtype=np.float32)
        self._top_k = np.full(max_rows, vocab_size, dtype=np.int64)
        self._top_p = np.ones(max_rows, dtype=np.float64)
        self._streams = np.zeros(max_rows, dtype=np.uint64)
        self._reports = np.zeros(max_rows, dtype=np.bool_)
        self._num_top = np.zeros(max_rows, dtype=np.int64)
        self._rules = [rule(max_rows, vocab_size) for rule in RULES]

    def add(self, row: int, start: RequestStart) -> None:
        """Take the options of a request into `row`. Raises RequestError for a token id outside the vocabulary."""
        self.remove(row)
        for rule in self._rules:
            rule.add(row, start)
        sampling = start.sampling
        self._draws[row] = not sampling.greedy
        self._temperature[row] = sampling.temperature
        self._min_p[row] = sampling.min_p
        self._top_k[row] = min(sampling.top_k, self._vocab_size) if sampling.top_k > 0 else self._vocab_size
        self._top_p[row] = sampling.top_p
        self._streams[row] = stream_state(start.seed)
        self._reports[row] = sampling.logprobs is not None
        self._num_top[row] = sampling.logprobs or 0

    def attach_grammars(self, grammars: Grammars) -> None:
        """Take what follows the forms of answers; called before the first request that asks for one."""
        for rule in self._rules:
            if isinstance(rule, GrammarMasks):
                rule.attach(grammars)

    def remove(self, row: int) -> None:
        """Forget the request of `row`, if there is one."""
        for rule in self._rules:
            rule.remove(row)

    def sample(self, logits: torch.Tensor, positions: SamplePositions) -> SampledTokens:
        """Choose a token at each of the positions. logits: [S, V], float32, overwritten.

        A position's random number belongs to its request's seed and the number of tokens before it. Logits that are
        NaN, +inf or all -inf are a fault of their position alone.
        """
        rows = positions.rows
        if not len(rows):
            return SampledTokens([])
        reporting = np.flatnonzero(self._reports[rows])
        raw = logits[torch.from_numpy(reporting).to(self._device)] if len(reporting) else None
        raw_peaks = self._apply_rules(logits, positions)
        tokens = self._choose(logits, positions)
        chosen, peaks = tokens.token_ids, tokens.peaks
        raw_peaks = peaks if raw_peaks is None else raw_peaks
        # One transfer to the host: it waits for the device.
        token_ids, sane, raw_sane = torch.stack([chosen, peaks.isfinite(), raw_peaks.isfinite()]).tolist()
        faults = {i: raw_fault(raw_peaks[i].item()) for i, flag in enumerate(raw_sane) if not flag}
        unsound = frozenset(faults)
        faults |= {i: self._options_fault(int(rows[i])) for i, flag in enumerate(sane) if not flag and i not in faults}
        logprobs = {} if raw is None else self._logprobs(raw, reporting, rows, chosen)
        logprobs = {i: value for i, value in logprobs.items() if i not in faults}
        return SampledTokens(token_ids, logprobs, faults, unsound)

    def _options_fault(self, row: int) -> str:
        found = next((fault for rule in self._rules if (fault := rule.fault(row)) is not None), None)
        return OPTIONS_FAULT if found is None else f"{NO_TOKEN_LEFT}: {found}"

    def _apply_rules(self, logits: torch.Tensor, positions: SamplePositions) -> torch.Tensor | None:
        """Change the logits of rows with such options. Returns the maximum before, [S], unless nothing changed."""
        rules = [rule for rule in self._rules if rule.concerns(positions.rows)]
        if not rules:
            return None
        raw_peaks = logits.amax(dim=1)
        for rule in rules:
            rule.apply(logits, positions)
        return raw_peaks

    def _choose(self, logits: torch.Tensor, positions: SamplePositions) -> ChosenTokens:
        """Choose after all rules, on the device. logits: [S, V], left as they are."""
        rows = positions.rows
        if self._ops is not None:
            options = self.draw_options(rows, positions.num_tokens)
            temperature = np.where(self._draws[rows], options.temperature, np.float32(0.0))
            chosen = self._ops.choose_tokens(logits, replace(options, temperature=temperature))
            if chosen is not None:
                return chosen
            self._ops = None  # a platform that leaves it to core always does
        peaks, token_ids = logits.max(dim=1)
        drawing = np.flatnonzero(self._draws[rows])
        if len(drawing):
            drawn = draw_tokens(logits, drawing, self.draw_options(rows[drawing], positions.num_tokens[drawing]))
            token_ids[torch.from_numpy(drawing).to(self._device)] = drawn
        return ChosenTokens(token_ids, peaks)

    def draws(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which rows draw by chance; the others take the most likely token. rows: [S]. Returns [S]."""
        return self._draws[rows]

    def is_plain(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which rows need nothing but a draw or the most likely token: no rule, no log-probabilities. [S]."""
        plain = ~self._reports[rows]
        for rule in self._rules:
            plain &= ~rule.holds(rows)
        return plain

    def draw_options(self, rows: NDArray[np.int64], num_tokens: NDArray[np.int64]) -> DrawOptions:
        """Return the options of rows that draw, with the random number of each. rows, num_tokens: [R]."""
        fractions = draw_fractions(self._streams[rows], num_tokens)
        columns = (self._temperature[rows], self._min_p[rows], self._top_k[rows], self._top_p[rows])
        return DrawOptions(*columns, fractions)

    def _logprobs(
        self, raw: torch.Tensor, reporting: NDArray[np.int64], rows: NDArray[np.int64], chosen: torch.Tensor
    ) -> dict[int, TokenLogprobs]:
        token_ids = chosen[torch.from_numpy(reporting).to(self._device)]
        values = token_logprobs(raw, token_ids, self._num_top[rows[reporting]].tolist())
        return dict(zip(reporting.tolist(), values, strict=True))


def raw_fault(peak: float) -> str:
    """Say what is wrong with a request whose largest logit is `peak`, which is not finite."""
    if math.isnan(peak):
        what = "NaN logits"
    else:
        what = f"logits whose maximum is {peak}"
    return f"the model gave {what} for this request; check its weights, and rule out overflow with dtype='float32'"
