"""Prompts that become vectors: asked of the engine some at a time, and read until each has its own."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from zif.engine.pooling import POOLED_SAMPLING, PoolingParams, PoolingTask, cosine
from zif.errors import RequestError
from zif.serving.answers import AnswerDelta, EngineClient, EnginePrompt
from zif.serving.chat.service import note_answer
from zif.serving.http.errors import ApiError, FailureKind
from zif.serving.http.exchange import Caller, RequestRecord
from zif.serving.openai.fields import invalid
from zif.serving.openai.samples import check_end, merged
from zif.serving.prompts import Prompts

PROMPTS_AT_ONCE = 64
"""Of one request, in the engine: so that one long list does not fill everybody's queue."""

CLASSIFY = PoolingParams(task=PoolingTask.CLASSIFY)

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks the engine, and what goes with each prompt. Mutates `record` as answers come."""

    engine: EngineClient
    caller: Caller
    record: RequestRecord
    cache_salt: str
    priority: int

    def require(self, params: PoolingParams) -> None:
        """Raise ApiError when the model cannot make this of a prompt."""
        abilities, param = self.engine.info.pooling, None
        try:
            abilities.check(replace(params, dimensions=None))
            param = "dimensions"
            abilities.check(params)
        except RequestError as error:
            raise invalid(str(error), param, "unsupported_by_model") from error

    async def vectors(self, prompts: Sequence[list[int]], params: PoolingParams) -> AsyncGenerator["Vector", None]:
        """Give the vector of each prompt, in any order. Raises ApiError for one that has none, and ends them all."""
        self._check_lengths(prompts)
        self.record.num_prompt_tokens += sum(map(len, prompts))
        sources = [self._ask(token_ids, params) for token_ids in prompts]
        async with aclosing(merged(sources, PROMPTS_AT_ONCE)) as items:
            async for item in items:
                if item.value is None:
                    continue
                note_answer(self.record, item.value)
                for sample in item.value.samples:
                    check_end(sample.finish_reason, sample.error)
                if item.value.finished:
                    self.record.num_cached_tokens += item.value.num_cached_tokens
                    yield Vector(item.source, _vector(item.value))

    async def all_vectors(self, prompts: Sequence[list[int]], params: PoolingParams) -> list[Float32]:
        """Return the vector of each prompt, in their order."""
        found: dict[int, Float32] = {}
        async with aclosing(self.vectors(prompts, params)) as vectors:
            async for vector in vectors:
                found[vector.index] = vector.values
        return [found[index] for index in range(len(prompts))]

    def _ask(self, token_ids: list[int], params: PoolingParams) -> AsyncGenerator[AnswerDelta, None]:
        salt = self.caller.cache_salt(self.cache_salt)
        prompt = EnginePrompt(token_ids, cache_salt=salt, tenant=self.caller.tenant, pooling=params)
        return self.engine.generate(prompt, POOLED_SAMPLING, self.priority)

    def _check_lengths(self, prompts: Sequence[list[int]]) -> None:
        limit = self.engine.info.max_model_len
        for index, token_ids in enumerate(prompts):
            if len(token_ids) > limit:
                raise invalid(
                    f"text {index} has {len(token_ids)} tokens, and the model's context is {limit}; shorten it",
                    code="context_length_exceeded",
                )


@dataclass(frozen=True, slots=True)
class Vector:
    """What prompt `index` became. values: [C]."""

    index: int
    values: Float32


async def encoded(texts: Sequence[str], prompts: Prompts, *, add_special_tokens: bool = True) -> list[list[int]]:
    """Return the tokens of texts. Raises RequestError for one that no context holds, or that has no UTF-8 form."""
    found = []
    for text in texts:
        found.append(await prompts.encode(text, add_special_tokens=add_special_tokens, name="text"))
        # Short texts are encoded on the event loop: between two of them others get their turn.
        await asyncio.sleep(0)
    return found


async def pair_scores(asker: Asker, prompts: Prompts, queries: Sequence[str], documents: Sequence[str]) -> list[float]:
    """Return the score of each query and document: by the model's score head, or the cosine of their embeddings."""
    abilities = asker.engine.info.pooling
    try:
        abilities.require_score()
    except RequestError as error:
        raise invalid(str(error), code="unsupported_by_model") from error
    if abilities.labels:
        pairs = []
        for query, document in zip(queries, documents, strict=True):
            pairs.append(await prompts.encode_pair(query, document))
            await asyncio.sleep(0)
        return [abilities.score(logits) for logits in await asker.all_vectors(pairs, CLASSIFY)]
    texts = list(dict.fromkeys((*queries, *documents)))
    token_ids = await encoded(texts, prompts)
    found = dict(zip(texts, await asker.all_vectors(token_ids, PoolingParams()), strict=True))
    return [cosine(found[q], found[d]) for q, d in zip(queries, documents, strict=True)]


def _vector(delta: AnswerDelta) -> Float32:
    if delta.pooled is None:
        raise ApiError(FailureKind.INTERNAL, "the answer failed: the engine gave no vector", code="generation_failed")
    return np.frombuffer(delta.pooled, dtype="<f4").astype(np.float32, copy=False)
