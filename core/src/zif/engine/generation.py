"""One prompt being answered: its samples, their text so far, and what the caller gets to see of them.

The scheduler owns the requests; this file only turns tokens into output. `engine.py` is the only caller.
"""

from dataclasses import dataclass, field

from zif.contract import FinishReason, Request, SamplingParams, TokenLogprobs
from zif.engine.inputs import Prompt
from zif.engine.outputs import CompletionOutput, Logprob, PositionLogprobs, RequestMetrics, RequestOutput
from zif.engine.pooling import PooledPrompt
from zif.engine.vocabulary import Vocabulary
from zif.kv.tiers import DEVICE
from zif.text.detokenizer import Detokenizer
from zif.text.stop_strings import StopStrings


class SampleText:
    """The text of one sample, decoded as late as stop strings allow."""

    def __init__(self, prompt: Prompt, sampling: SamplingParams, vocabulary: Vocabulary) -> None:
        self._detokenizer = Detokenizer(vocabulary.tokenizer, prompt.token_ids, sampling.skip_special_tokens)
        self._stops = StopStrings(sampling.stop_strings, sampling.include_stop_str_in_output)
        self._must_scan = bool(sampling.stop_strings)
        self._min_tokens = sampling.min_tokens
        self._pending: list[int] = []
        self._pieces: list[str] = []

    @property
    def matched(self) -> str | None:
        """Return the stop string that ended the sample, if one did."""
        return self._stops.matched

    def append(self, token_ids: list[int], num_earlier: int) -> int:
        """Add tokens that follow `num_earlier` others, up to the one that completes a stop string; count those added.

        Stop strings that end before the sample may stop are text like any other.
        """
        if not self._must_scan:
            self._pending += token_ids
            return len(token_ids)
        for count, token_id in enumerate(token_ids, start=1):
            self._pending.append(token_id)
            self._show(self._decode(), may_stop=num_earlier + count >= self._min_tokens)
            if self.matched is not None:
                return count
        return len(token_ids)

    def finish(self) -> None:
        """Show what was held back; no token follows."""
        self._show(self._decode() + self._detokenizer.finish(), may_stop=True)
        if self.matched is None:
            self._pieces.append(self._stops.finish())

    def text(self) -> str:
        """Return the text that is certain so far."""
        if not self._must_scan:
            self._show(self._decode(), may_stop=True)
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def take(self) -> str:
        """Return the text that became certain since the last call, and forget it."""
        if not self._must_scan:
            self._show(self._decode(), may_stop=True)
        pieces, self._pieces = self._pieces, []
        return "".join(pieces)

    def _show(self, text: str, may_stop: bool) -> None:
        if self.matched is None and text:
            self._pieces.append(self._stops.append(text) if may_stop else self._stops.finish() + text)

    def _decode(self) -> str:
        token_ids, self._pending = self._pending, []
        return self._detokenizer.append(token_ids) if token_ids else ""


@dataclass(slots=True, eq=False)
class Sample:
    """One of the n samples of a prompt. `take` has given out `num_taken` of its tokens, and its end if `end_taken`."""

    index: int
    request: Request
    text: SampleText | None
    logprobs: list[PositionLogprobs] | None
    cumulative_logprob: float | None
    num_taken: int = 0
    end_taken: bool = False

    @property
    def finished(self) -> bool:
        """Say whether the sample has ended."""
        return self.request.finished


@dataclass(slots=True, eq=False)
class Generation:
    """A prompt, its samples, and when things happened. Handed to callers as an opaque handle.

    `pooled` takes the hidden states of a prompt that is pooled; its one sample stays without tokens.
    """

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    samples: list[Sample]
    arrival_s: float
    started_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = field(default=None)
    pooled: PooledPrompt | None = None

    @property
    def finished(self) -> bool:
        """Say whether every sample has ended."""
        return self.finished_s is not None

    @property
    def pooling_error(self) -> str | None:
        """Say why a pooled prompt that has ended has no result; None when it has one."""
        request = self.samples[0].request
        if request.finish_reason is not FinishReason.STOP:
            return request.error or "it was aborted before its end"
        return None if self.pooled is None else self.pooled.problem()

    @property
    def queue_s(self) -> float | None:
        """Return the seconds from arrival to the first step, None before it."""
        return None if self.started_s is None else self.started_s - self.arrival_s

    @property
    def num_cached_tokens(self) -> int:
        """Count the prompt tokens that were found computed."""
        return self.samples[0].request.num_cached_tokens


class OutputProcessor:
    """Turn what steps gave into outputs."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def begin(self, index: int, request: Request, prompt: Prompt) -> Sample:
        """Make the output side of one sample. Raises `RequestError` when it needs a tokenizer and there is none."""
        sampling = request.sampling
        text = SampleText(prompt, sampling, self._vocabulary) if sampling.detokenize else None
        wants_logprobs = sampling.logprobs is not None
        return Sample(index, request, text, [] if wants_logprobs else None, 0.0 if wants_logprobs else None)

    def append(self, sample: Sample, token_ids: list[int], logprobs: list[TokenLogprobs]) -> bool:
        """Add a step's tokens to a sample. True when a stop string ended it; tokens after that are taken back."""
        request, text = sample.request, sample.text
        num_kept = len(token_ids)
        if text is not None:
            ended_by_token = request.finish_reason is FinishReason.STOP
            hides_last = ended_by_token and not request.sampling.include_stop_str_in_output
            visible = token_ids[:-1] if hides_last else token_ids
            num_shown = text.append(visible, request.num_output_tokens - len(token_ids))
            if text.matched is not None and num_shown < len(token_ids):
                num_kept = num_shown
                del request.token_ids[len(request.token_ids) - len(token_ids) + num_kept :]
                request.stop_token_id = None
        for entry in logprobs[:num_kept]:
            self._add_logprobs(sample, entry)
        if text is None:
            return False
        if request.finished:
            text.finish()
            if text.matched is not None and request.finish_reason is FinishReason.LENGTH:
                request.finish_reason = FinishReason.STOP
        return text.matched is not None and not request.finished

    def position_logprobs(self, entry: TokenLogprobs) -> PositionLogprobs:
        """Return the log-probabilities of one position by token id; the chosen token comes first."""
        chosen = entry.token_ids[0]
        found = {chosen: Logprob(entry.logprobs[0], entry.rank, self._vocabulary.token_text(chosen))}
        for rank, (token_id, logprob) in enumerate(zip(entry.token_ids[1:], entry.logprobs[1:], strict=True), start=1):
            if token_id not in found:
                found[token_id] = Logprob(logprob, rank, self._vocabulary.token_text(token_id))
        return found

    def output(self, generation: Generation) -> RequestOutput:
        """Return what the caller sees now."""
        requests = [sample.request for sample in generation.samples]
        return RequestOutput(
            request_id=generation.request_id,
            prompt=generation.prompt.text,
            prompt_token_ids=generation.prompt.token_ids,
            outputs=[self._completion(sample) for sample in generation.samples],
            finished=generation.finished,
            num_cached_tokens=requests[0].num_cached_tokens,
            cache_miss=_cache_miss(requests[0]),
            cached_tokens_by_tier=_by_tier(requests[0]),
            prompt_logprobs=generation.prompt_logprobs,
            metrics=RequestMetrics(
                arrival_s=generation.arrival_s,
                first_token_s=generation.first_token_s,
                finished_s=generation.finished_s,
                num_preemptions=sum(request.num_preemptions for request in requests),
                num_drafted_tokens=sum(request.num_drafted_tokens for request in requests),
                num_accepted_tokens=sum(request.num_accepted_tokens for request in requests),
                num_recoveries=sum(request.num_recoveries for request in requests),
            ),
        )

    def take(self, generation: Generation) -> list[CompletionOutput]:
        """Return what each sample got since the last call, at the cost of what is new; others are left out.

        Text and log-probabilities that were taken are no longer part of `output`.
        """
        return [
            self._take(sample)
            for sample in generation.samples
            if not sample.end_taken and (sample.finished or sample.request.num_output_tokens > sample.num_taken)
        ]

    def _take(self, sample: Sample) -> CompletionOutput:
        request = sample.request
        new = request.token_ids[request.num_prompt_tokens + sample.num_taken :]
        sample.num_taken += len(new)
        sample.end_taken = sample.finished
        logprobs = sample.logprobs
        if logprobs is not None:
            sample.logprobs = []
        return CompletionOutput(
            index=sample.index,
            text=sample.text.take() if sample.text else "",
            token_ids=new,
            cumulative_logprob=sample.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=request.finish_reason.value if request.finish_reason else None,
            stop_reason=_stop_reason(sample) if sample.end_taken else None,
            error=request.error,
        )

    def _add_logprobs(self, sample: Sample, entry: TokenLogprobs) -> None:
        if sample.logprobs is not None and sample.cumulative_logprob is not None:
            sample.logprobs.append(self.position_logprobs(entry))
            sample.cumulative_logprob += entry.logprobs[0]

    def _completion(self, sample: Sample) -> CompletionOutput:
        request = sample.request
        return CompletionOutput(
            index=sample.index,
            text=sample.text.text() if sample.text else "",
            token_ids=request.output_token_ids,
            cumulative_logprob=sample.cumulative_logprob,
            logprobs=sample.logprobs,
            finish_reason=request.finish_reason.value if request.finish_reason else None,
            stop_reason=_stop_reason(sample),
            error=request.error,
        )


def _cache_miss(request: Request) -> str | None:
    return request.prefix.miss.value if request.prefix and request.prefix.miss else None


def _by_tier(request: Request) -> dict[str, int]:
    found = request.prefix.by_tier if request.prefix else ()
    return dict(found) or {DEVICE: request.num_cached_tokens}


def _stop_reason(sample: Sample) -> int | str | None:
    """Return what stopped the sample; an end-of-sequence token counts as no reason of its own."""
    if sample.text is not None and sample.text.matched is not None:
        return sample.text.matched
    stopped_by = sample.request.stop_token_id
    return stopped_by if stopped_by in (sample.request.sampling.stop_token_ids or ()) else None
