"""What a runner remembers of its requests between steps: rows, options, and what became of drafts.

Host memory only: runners that bring their own way to compute keep their requests with it, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from zif.contract import EngineConfig, HiddenRows, KVGroup, StepPlan, StepResult
from zif.runtime.batch import BatchState, StepBatch
from zif.runtime.hidden import WantedRows
from zif.runtime.sampler import SampledTokens, Sampler
from zif.runtime.tokens import Int64, SamplePositions
from zif.runtime.verification import doubtful_requests, kept_positions


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Tokens of a prompt whose log-probabilities a step can tell: those after the first that it computes.

    tokens: [P], int64, indices of the step's tokens, each the one before. targets: [P], int64, the prompt's tokens.
    """

    request_id: int
    tokens: Int64
    targets: Int64
    num_logprobs: int


class RequestBook:
    """The requests that a runner holds. `sampler` gets their options by row."""

    def __init__(self, config: EngineConfig, groups: tuple[KVGroup, ...], sampler: Sampler) -> None:
        self._state = BatchState(config.max_num_seqs, groups)
        self._sampler = sampler
        self._prompt_logprobs: dict[int, int] = {}
        self._hidden: dict[int, HiddenRows] = {}

    def apply(self, step: StepPlan) -> None:
        """Bring the rows up to date with what a plan released, started and allocated."""
        for request_id in step.released:
            row = self._state.release(request_id)
            self._prompt_logprobs.pop(request_id, None)
            self._hidden.pop(request_id, None)
            if row is not None:
                self._sampler.remove(row)
        for start in step.started:
            self._sampler.add(self._state.start(start), start)
            if start.sampling.prompt_logprobs is not None:
                self._prompt_logprobs[start.request_id] = start.sampling.prompt_logprobs
            if start.hidden is not None:
                self._hidden[start.request_id] = start.hidden
        for update in step.block_updates:
            self._state.put_blocks(update.request_id, update.group, update.start, update.block_ids)

    def batch(self, step: StepPlan) -> StepBatch:
        """Build the arrays of a plan that has been applied."""
        return self._state.batch(step)

    def positions(self, batch: StepBatch) -> SamplePositions:
        """Return where a step samples."""
        return batch.sample_positions(self._state.tokens)

    def take(self, step: StepPlan, batch: StepBatch, sampled: SampledTokens, result: StepResult) -> list[int]:
        """Take in the tokens sampled at the step's positions, and put into `result` those that count.

        Returns the indices of requests that got none, because a fault struck beside a draft.
        """
        positions = self.positions(batch)
        chosen = np.asarray(sampled.token_ids, dtype=np.int64)
        kept, doubtful = np.ones(len(chosen), dtype=np.bool_), []
        if step.drafts:
            kept = kept_positions(batch.sample_requests, positions, chosen)
            doubtful = doubtful_requests(step, batch.sample_requests[[i for i in sampled.faults if kept[i]]])
            kept &= ~np.isin(batch.sample_requests, doubtful)
        self._state.tokens.put(positions.rows[kept], positions.num_tokens[kept], chosen[kept])
        requests = batch.sample_requests.tolist()
        for index in np.flatnonzero(kept).tolist():
            result.sampled[requests[index]].append(sampled.token_ids[index])
        for index, entry in sampled.logprobs.items():
            if kept[index]:
                result.logprobs.setdefault(step.request_ids[requests[index]], []).append(entry)
        for index, fault in sampled.faults.items():
            if kept[index]:
                result.faults.setdefault(step.request_ids[requests[index]], fault)
                if index in sampled.unsound:
                    result.unsound.add(step.request_ids[requests[index]])
        return doubtful

    def settle(self, step: StepPlan, result: StepResult) -> None:
        """Keep the states after drafts that were accepted to the end."""
        for request, request_id in enumerate(step.request_ids) if step.drafts else ():
            draft = step.drafts.get(request_id)
            if draft is not None and len(result.sampled[request]) > len(draft.token_ids):
                self._state.keep_states(step, request)

    def prompt_rows(self, step: StepPlan, batch: StepBatch) -> Iterator[PromptRows]:
        """Yield the prompt tokens of the step whose requests asked for log-probabilities."""
        tokens = self._state.tokens
        for request, request_id in enumerate(step.request_ids) if self._prompt_logprobs else ():
            if request_id not in self._prompt_logprobs:
                continue
            row, first = int(batch.rows[request]), int(batch.query_start[request])
            computed = int(batch.positions[first])
            end = min(computed + int(batch.query_start[request + 1]) - first, int(tokens.num_prompt_tokens[row]) - 1)
            if end > computed:
                targets = tokens.tokens[row, computed + 1 : end + 1].astype(np.int64)
                span = np.arange(first, first + end - computed)
                yield PromptRows(request_id, span, targets, self._prompt_logprobs[request_id])

    def hidden_rows(self, step: StepPlan, batch: StepBatch) -> list[WantedRows]:
        """Return the tokens of the step whose hidden states requests have asked for."""
        wanted = []
        for request, request_id in enumerate(step.request_ids) if self._hidden else ():
            rows = self._hidden.get(request_id)
            first, end = int(batch.query_start[request]), int(batch.query_start[request + 1])
            if rows is HiddenRows.ALL:
                wanted.append(WantedRows(request_id, np.arange(first, end)))
            elif rows is HiddenRows.LAST and batch.positions[end - 1] + 1 == self._num_known(int(batch.rows[request])):
                wanted.append(WantedRows(request_id, np.arange(end - 1, end)))
        return wanted

    def _num_known(self, row: int) -> int:
        return int(self._state.tokens.num_tokens[row])
