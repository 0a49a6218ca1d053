"""One vector, or the logits of labels, of a prompt: what becomes of the hidden states that a runner reports.

The runner gives rows of the final hidden state (`StepResult.hidden`); pooling, dense layers, shortening, normalization
and score heads are here, in host memory: a row or two of arithmetic a prompt. The engine owns one `Pooler`.
"""

import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from zif.contract import HiddenRows, ModelDescription, SamplingParams
from zif.engine.hidden_sums import HiddenSums
from zif.errors import ModelError, RequestError
from zif.models.heads import Head, split_architecture
from zif.models.pooling import Activation, PoolingMode, PoolingSpec, read_pooling

if TYPE_CHECKING:
    from zif.models.pooling_weights import PoolingWeights

logger = logging.getLogger(__name__)

Float32 = NDArray[np.float32]

POOLED_SAMPLING = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
"""What stands for sampling options in a request that samples nothing."""

_MIN_LENGTH = 1e-12
"""As in torch's `normalize`: a vector of zeros stays one."""


class PoolingTask(StrEnum):
    """What is asked of a prompt: its embedding, or the logits of a score head."""

    EMBED = "embed"
    CLASSIFY = "classify"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """What to make of a prompt. `dimensions` shortens an embedding to its first elements (None: as long as it is)."""

    task: PoolingTask = PoolingTask.EMBED
    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class PoolingAbilities:
    """What an open model can make of prompts.

    `generates`: text. `labels` are those of a score head, without which there are embeddings of `num_dimensions`
    (None: not known before the first), which may be shortened to `shorter_dimensions` (empty: any length). A single
    logit becomes a score by the logistic function if `applies_sigmoid`. `problem` says why nothing can be pooled.
    """

    generates: bool = True
    labels: tuple[str, ...] = ()
    num_dimensions: int | None = None
    shorter_dimensions: tuple[int, ...] = ()
    applies_sigmoid: bool = True
    problem: str | None = None

    def check(self, params: PoolingParams) -> None:
        """Raise `RequestError` for what the model cannot make of a prompt, with the reason."""
        if self.problem is not None:
            raise RequestError(self.problem)
        if params.task is PoolingTask.CLASSIFY and not self.labels:
            raise RequestError("the model has no score head, which labels need; ask for embeddings instead")
        if params.task is PoolingTask.EMBED and self.labels:
            raise RequestError("the model has a score head and gives no embeddings; ask for scores instead")
        if params.dimensions is not None:
            self._check_dimensions(params.dimensions)

    def require_generating(self) -> None:
        """Raise `RequestError` for a model that generates no text."""
        if not self.generates:
            what = "scores" if self.labels else "embeddings"
            raise RequestError(f"the model has no output matrix to generate text with; ask it for {what} instead")

    def require_score(self) -> None:
        """Raise `RequestError` unless what the model says of a pair of texts is one number."""
        if self.problem is not None:
            raise RequestError(self.problem)
        if len(self.labels) > 2:
            raise RequestError(
                f"the model's score head has {len(self.labels)} labels, and a score is one number; use a model with "
                "one label, or with two, of which the second means relevant"
            )

    def score(self, logits: Float32) -> float:
        """Return the score of a pair of texts: of its one logit, or the probability of the second of two labels."""
        if len(logits) == 1 and not self.applies_sigmoid:
            return float(logits[0])
        log_odds = float(logits[-1]) - (float(logits[0]) if len(logits) > 1 else 0.0)
        return float(0.5 * (1.0 + np.tanh(0.5 * log_odds)))  # the logistic function, which cannot overflow so

    def _check_dimensions(self, wanted: int) -> None:
        most = self.num_dimensions
        if self.labels:
            raise RequestError(f"dimensions={wanted!r} belongs to embeddings; leave it out")
        if most is None:
            raise RequestError(f"dimensions={wanted!r}: config.json does not tell the model's own; leave it out")
        if type(wanted) is not int or not 1 <= wanted <= most:
            raise RequestError(f"dimensions={wanted!r} must be an integer from 1 to {most}, the model's own")
        if self.shorter_dimensions and wanted not in (*self.shorter_dimensions, most):
            allowed = ", ".join(map(str, sorted({*self.shorter_dimensions, most})))
            raise RequestError(f"dimensions={wanted!r} is none that the model was trained for, which are {allowed}")


class PooledPrompt:
    """The hidden states of one prompt as they come, and what they make. `rows` are those that it needs."""

    def __init__(self, pooler: "Pooler", params: PoolingParams, num_tokens: int) -> None:
        self.rows = HiddenRows.LAST if pooler.mode is PoolingMode.LAST else HiddenRows.ALL
        self._pooler = pooler
        self._params = params
        self._num_wanted = 1 if self.rows is HiddenRows.LAST else num_tokens
        self._sums = HiddenSums(pooler.mode)

    def take(self, data: bytes, start: int, num_tokens: int) -> None:
        """Take what a step reported that computed `num_tokens` tokens from `start` on.

        Rows that came before, of tokens that are computed again after a preemption, are left out.
        """
        if self.rows is HiddenRows.LAST:
            start, num_tokens = 0, 1
        known = self._sums.num_tokens
        if start <= known < start + num_tokens:
            rows = np.frombuffer(data, dtype="<f4").reshape(num_tokens, -1)
            self._sums.add(rows[known - start :].astype(np.float32, copy=False))

    def problem(self) -> str | None:
        """Say, once the prompt is computed, what keeps it from being pooled; None when every row has come."""
        num_known = self._sums.num_tokens
        if num_known == self._num_wanted:
            return None
        return (
            f"hidden states of {num_known} tokens came, and {self._num_wanted} were asked for: a fault of the platform"
        )

    def vector(self) -> Float32:
        """Return the embedding, or the logits of the labels. There must be no `problem`."""
        return self._pooler.finished(self._sums.pooled(), self._params)


class Pooler:
    """What one model makes of hidden states."""

    def __init__(self, spec: PoolingSpec, weights: "PoolingWeights | None", abilities: PoolingAbilities) -> None:
        self.abilities = abilities
        self.notes = spec.notes
        self.mode = spec.mode
        self._spec = spec
        self._weights = weights

    @classmethod
    def open(cls, model: ModelDescription, problem: str | None) -> "Pooler":
        """Read what a model's files say of pooling; `problem` says why this engine cannot pool, None where it can.

        Raises `ModelError` when the model pools and does nothing else, and cannot.
        """
        head = split_architecture(model.architecture).head
        spec, weights = PoolingSpec(), None
        try:
            spec = read_pooling(model.path, model.architecture, model.config, model.max_model_len)
            weights = None if problem else _weights(model, spec)
        except ModelError as error:
            if head is not Head.TOKENS:
                raise
            # Its words have paths; callers of a server read the problem.
            logger.warning("this model's prompts cannot be pooled: %s", error)
            problem = problem or "prompts cannot be pooled the way this model's files say; the log has the reason"
        if problem is not None and head is not Head.TOKENS:
            raise ModelError(f"{model.architecture!r} generates no text, and cannot be pooled: {problem}")
        return cls(spec, weights, _abilities(model, spec, problem))

    def begin(self, params: PoolingParams, num_tokens: int) -> PooledPrompt:
        """Make what takes the hidden states of a prompt of `num_tokens` tokens."""
        return PooledPrompt(self, params, num_tokens)

    def strip_padding(self, token_ids: list[int]) -> list[int]:
        """Leave out what a score head does not look at: padding behind the last token that is none.

        As in transformers, whose heads take the hidden state of the last token that is no padding, of the first where
        all are. In a causal decoder that state depends on no later token.
        """
        end = len(token_ids)
        while self._spec.labels and end > 1 and token_ids[end - 1] == self._spec.pad_token_id:
            end -= 1
        return token_ids[:end]

    def finished(self, vector: Float32, params: PoolingParams) -> Float32:
        """Return what pooled hidden states, [C], become: the embedding, or the logits of the labels."""
        if self._weights is not None and self._weights.score is not None:
            return self._weights.score.apply(vector)
        for layer in self._weights.dense if self._weights else ():
            vector = layer.apply(vector)
        if params.dimensions is not None:
            vector = vector[: params.dimensions]
        if self._spec.normalizes:
            vector = vector / np.float32(max(float(np.linalg.norm(vector.astype(np.float64))), _MIN_LENGTH))
        return vector


def cosine(first: Float32, second: Float32) -> float:
    """Return the cosine of two embeddings, 0 where one is nothing but zeros."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), _MIN_LENGTH))


def _weights(model: ModelDescription, spec: PoolingSpec) -> "PoolingWeights | None":
    if not spec.labels and not spec.dense:
        return None
    from zif.models.pooling_weights import load_pooling

    return load_pooling(model.path, spec, _hidden_size(model))


def _abilities(model: ModelDescription, spec: PoolingSpec, problem: str | None) -> PoolingAbilities:
    num_dimensions = spec.dense[-1].num_outputs if spec.dense else _hidden_size(model)
    return PoolingAbilities(
        generates=split_architecture(model.architecture).head is Head.TOKENS,
        labels=spec.labels,
        num_dimensions=None if spec.labels else num_dimensions,
        shorter_dimensions=spec.shorter_dimensions,
        applies_sigmoid=spec.score_activation is Activation.SIGMOID,
        problem=problem,
    )


def _hidden_size(model: ModelDescription) -> int | None:
    """Return the channels of hidden states, None where the configuration has another word for them."""
    text_config = model.config.get("text_config") or {}
    size = model.config.get("hidden_size", text_config.get("hidden_size"))
    return size if type(size) is int else None
