"""Prompts in, vectors and scores out: what `LLM.embed`, `LLM.classify` and `LLM.score` do.

A prompt that fails has an output that says so; the others go on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from zif.engine.engine import Engine
from zif.engine.generation import Generation
from zif.engine.inputs import PromptInput
from zif.engine.interaction import deferred_interrupt, progress_bar
from zif.engine.outputs import ClassificationOutput, EmbeddingOutput, PooledOutput, ScoringOutput
from zif.engine.pooling import Float32, PoolingParams, PoolingTask, cosine
from zif.errors import EngineError, RequestError

T = TypeVar("T")

_CLASSIFY = PoolingParams(task=PoolingTask.CLASSIFY)


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How a batch runs: the priority of its prompts, and whether a bar shows its progress."""

    priority: int = 0
    use_tqdm: bool = True


def embed_all(
    engine: Engine, prompts: Sequence[PromptInput], dimensions: int | None, options: BatchOptions
) -> list[PooledOutput[EmbeddingOutput]]:
    """Return the embedding of each prompt, in their order."""
    return _pool_all(
        engine,
        prompts,
        PoolingParams(dimensions=dimensions),
        options,
        lambda found: [_output(each, lambda vector: EmbeddingOutput(vector.tolist())) for each in found],
    )


def classify_all(
    engine: Engine, prompts: Sequence[PromptInput], options: BatchOptions
) -> list[PooledOutput[ClassificationOutput]]:
    """Return the logits and probabilities of the labels of each prompt, in their order."""
    return _pool_all(
        engine,
        prompts,
        _CLASSIFY,
        options,
        lambda found: [_output(each, lambda logits: _classification(engine, logits)) for each in found],
    )


def score_all(
    engine: Engine, queries: Sequence[str], documents: Sequence[str], options: BatchOptions
) -> list[PooledOutput[ScoringOutput]]:
    """Return the score of each pair, in their order; `queries` has as many texts as `documents`."""
    abilities = engine.pooler.abilities
    abilities.require_score()
    if abilities.labels:
        pairs = [{"prompt_token_ids": engine.vocabulary.encode_pair(*p)} for p in zip(queries, documents, strict=True)]
        return _pool_all(
            engine,
            pairs,
            _CLASSIFY,
            options,
            lambda found: [_output(each, lambda logits: ScoringOutput(abilities.score(logits))) for each in found],
        )
    texts = list(dict.fromkeys((*queries, *documents)))

    def compared(found: list[Generation]) -> list[PooledOutput[ScoringOutput]]:
        embedded = dict(zip(texts, found, strict=True))
        return [_cosine_output(embedded[q], embedded[d]) for q, d in zip(queries, documents, strict=True)]

    return _pool_all(engine, texts, PoolingParams(), options, compared)


def _pool_all(
    engine: Engine,
    given: Sequence[PromptInput],
    params: PoolingParams,
    options: BatchOptions,
    outputs_of: Callable[[list[Generation]], list[PooledOutput[T]]],
) -> list[PooledOutput[T]]:
    """Check all prompts, then compute them, and make outputs of what was found; Ctrl-C ends the batch early.

    Raises `EngineError` with the outputs so far when the engine fails.
    """
    prompts = []
    for index, prompt in enumerate(given):
        try:
            prompts.append(engine.check_pooled(prompt, params))
        except RequestError as error:
            raise RequestError(f"prompt {index}: {error}") from error
    with progress_bar(len(prompts), options.use_tqdm) as advance, deferred_interrupt() as interrupted:
        generations = [engine.submit_pooled(prompt, params, options.priority) for prompt in prompts]
        unfinished = set(generations)
        try:
            while unfinished and not interrupted.is_set():
                for generation in unfinished.intersection(engine.step()):
                    if generation.finished:
                        unfinished.remove(generation)
                        advance(len(generation.prompt.token_ids))
            for generation in generations:
                engine.abort(generation)
        except Exception as error:
            message = f"the engine failed: {error!r}; what was computed is in .outputs"
            raise EngineError(message, outputs_of(generations)) from error
    return outputs_of(generations)


def _output(generation: Generation, made_of: Callable[[Float32], T]) -> PooledOutput[T]:
    """Return what a caller sees of a prompt; `made_of` turns its vector into the result."""
    assert generation.pooled is not None
    error = generation.pooling_error
    return PooledOutput(
        request_id=generation.request_id,
        prompt=generation.prompt.text,
        prompt_token_ids=generation.prompt.token_ids,
        outputs=made_of(generation.pooled.vector()) if error is None else None,
        num_cached_tokens=generation.num_cached_tokens,
        error=error,
    )


def _cosine_output(query: Generation, document: Generation) -> PooledOutput[ScoringOutput]:
    """Return the score of two embedded texts. The output's prompt is the document."""
    assert query.pooled is not None
    if query.pooling_error is not None:
        return replace(_output(document, lambda _: ScoringOutput(0.0)), outputs=None, error=query.pooling_error)
    embedded = query.pooled.vector()
    return _output(document, lambda vector: ScoringOutput(cosine(embedded, vector)))


def _classification(engine: Engine, logits: Float32) -> ClassificationOutput:
    """Add probabilities: of one label the logistic function, of several the softmax."""
    if len(logits) == 1:
        return ClassificationOutput(logits.tolist(), [engine.pooler.abilities.score(logits)])
    powers = np.exp(logits.astype(np.float64) - float(logits.max()))
    return ClassificationOutput(logits.tolist(), (powers / powers.sum()).tolist())
