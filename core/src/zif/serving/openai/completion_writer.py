"""What the engine gives for a prompt, written as choices of the completions API, piece by piece."""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from zif.serving.answers import AnswerDelta, PositionLogprobs, SampleDelta
from zif.serving.openai.completion_answer import Completion, CompletionChoice
from zif.serving.openai.completion_request import CompletionRequest
from zif.serving.openai.logprobs import (
    CompletionLogprobs,
    CompletionLogprobsWriter,
    TokenNames,
    joined_logprobs,
    prompt_logprobs,
    sliced,
)
from zif.serving.openai.samples import check_end
from zif.serving.openai.usage import Origin, Usage


@dataclass(frozen=True, slots=True)
class CompletionStyle:
    """What a request wants to see of its answer. `shows_tokens` is off for max_tokens=0."""

    origin: Origin
    names: TokenNames
    num_top_logprobs: int | None
    shows_tokens: bool
    with_prompt_logprobs: bool
    with_token_ids: bool
    usage_at_end: bool
    usage_in_chunks: bool

    @classmethod
    def of(cls, body: CompletionRequest, origin: Origin, names: TokenNames) -> "CompletionStyle":
        """Read what a request wants."""
        options = body.stream_options
        return cls(
            origin=origin,
            names=names,
            num_top_logprobs=body.logprobs,
            shows_tokens=body.max_tokens != 0,
            with_prompt_logprobs=body.prompt_logprobs is not None,
            with_token_ids=bool(body.return_token_ids),
            usage_at_end=options is not None and bool(options.include_usage),
            usage_in_chunks=options is not None and bool(options.continuous_usage_stats),
        )

    def completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        """Return an answer or a chunk with these choices."""
        origin = self.origin
        return Completion(
            id=origin.id,
            created=origin.created,
            model=origin.model,
            system_fingerprint=origin.system_fingerprint,
            choices=choices,
            usage=usage,
        )

    def chunk(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        """Return a chunk before the last; without `usage` it has None or nothing there, as was asked for."""
        return self.completion(choices, UNSET if usage is None and not self.usage_at_end else usage)


class PromptAnswer:
    """The samples of one prompt. Their choices begin at index `first_index`.

    `echoed` is the prompt's text where it is repeated, and `first_token` that of its first token.
    """

    def __init__(
        self, first_index: int, prompt_token_ids: list[int], echoed: str | None, first_token: str,
        style: CompletionStyle,
    ) -> None:  # fmt: skip
        self.prompt_token_ids = prompt_token_ids
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self._first_index = first_index
        self._echoed = echoed
        self._first_token = first_token
        self._style = style
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None
        self._echoed_logprobs: CompletionLogprobs | None = None
        self._echoed_end = 0
        self._writers: dict[int, CompletionLogprobsWriter] = {}

    def new_cached_tokens(self, delta: AnswerDelta) -> int:
        """Take the count of cached prompt tokens; return by how much it grew."""
        new = delta.num_cached_tokens - self.num_cached_tokens
        self.num_cached_tokens = delta.num_cached_tokens
        return new

    async def take(self, delta: AnswerDelta) -> list[CompletionChoice]:
        """Return the pieces of choices that a delta becomes. Raises ApiError for a sample that ended by a fault."""
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
            if self._echoed is not None and self._style.num_top_logprobs is not None:
                self._echoed_logprobs = await self._of_prompt(delta.prompt_logprobs, self._style.num_top_logprobs)
        return [self._piece(sample) for sample in delta.samples]

    async def complete(self, choice: CompletionChoice) -> None:
        """Add to a whole choice, if it is the prompt's first, what is said of a prompt once."""
        is_first = choice.index == self._first_index
        if is_first and self._style.with_prompt_logprobs and self._prompt_logprobs is not None:
            choice.prompt_logprobs = await prompt_logprobs(self._prompt_logprobs)

    async def _of_prompt(self, positions: Sequence[PositionLogprobs | None], num_top: int) -> CompletionLogprobs:
        writer = CompletionLogprobsWriter(num_top, self._style.names)
        pieces = [writer.write(some, self._first_token) async for some in sliced(positions)]
        self._echoed_end = writer.offset
        return joined_logprobs(pieces)

    def _piece(self, sample: SampleDelta) -> CompletionChoice:
        check_end(sample.finish_reason, sample.error)
        style, begins = self._style, sample.index not in self._writers
        shown = sample.token_ids if style.shows_tokens else []
        self.num_tokens += len(shown)
        text = sample.text if style.shows_tokens else ""
        reason = sample.finish_reason if style.shows_tokens or sample.finish_reason is None else "length"
        choice = CompletionChoice(
            index=self._first_index + sample.index,
            text=(self._echoed or "") + text if begins else text,
            logprobs=self._logprobs(sample),
            finish_reason=reason,
            stop_reason=UNSET if sample.stop_reason is None or not style.shows_tokens else sample.stop_reason,
        )
        if style.with_token_ids:
            choice.token_ids = shown
            choice.prompt_token_ids = self.prompt_token_ids if begins else UNSET
        return choice

    def _logprobs(self, sample: SampleDelta) -> CompletionLogprobs | None:
        style, echoed = self._style, self._echoed_logprobs
        writer = self._writers.get(sample.index)
        begins = writer is None
        if writer is None:
            writer = CompletionLogprobsWriter(style.num_top_logprobs or 0, style.names, self._echoed_end)
            self._writers[sample.index] = writer
        if style.num_top_logprobs is None:
            return None
        found = writer.write((sample.logprobs or ()) if style.shows_tokens else ())
        return joined_logprobs([echoed, found]) if begins and echoed is not None else found


def joined(pieces: Sequence[CompletionChoice]) -> CompletionChoice:
    """Return one choice out of its pieces, in order."""
    first, last = pieces[0], pieces[-1]
    return CompletionChoice(
        index=first.index,
        text="".join(piece.text for piece in pieces),
        logprobs=_all_logprobs(pieces),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_token_ids=first.prompt_token_ids,
        token_ids=_joined_ids(pieces),
    )


def _joined_ids(pieces: Sequence[CompletionChoice]) -> list[int] | UnsetType:
    if any(piece.token_ids is UNSET for piece in pieces):
        return UNSET
    return [token_id for piece in pieces if piece.token_ids is not UNSET for token_id in piece.token_ids]


def _all_logprobs(pieces: Sequence[CompletionChoice]) -> CompletionLogprobs | None:
    found = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return joined_logprobs(found) if found else None
