"""Whole sequences for attention, and what attention over them gives: random ones, and needles.

A needle row has one visible key that takes all the weight and carries a value of ordinary size. Every other value is a
thousand times larger, and keys that the row must not see fit it even better. Who misses the needle, or sees one key too
many, is wrong by a thousand. No paging here: that is `zif_conformance.oracle.paged`.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from zif.contract import AttentionBatch, AttentionParams, FullAttentionSpec, KVArena, KVGroup
from zif.reference.attention import ReferenceAttention
from zif_conformance.oracle.codes import CODED, held
from zif_conformance.oracle.inputs import Inputs, torch_dtype

NEEDLE_SCORE = 60.0
DECOY_SIZE = 1000.0
_NUM_KEY_ORDERS = 3
_KEY_BLOCK = 16


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """A step: `requests` are (queries in it, tokens with KV after it). `kv_dtype` None is the model's dtype.

    `compute` is the dtype in which the device says that it multiplies.
    """

    requests: tuple[tuple[int, int], ...]
    dtype: str = "float32"
    kv_dtype: str | None = None
    num_kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    seed: int = 0
    compute: str = "float32"

    @property
    def stored(self) -> str:
        """Name the dtype of the cache."""
        return self.kv_dtype or self.dtype

    @property
    def num_heads(self) -> int:
        """Count the query heads."""
        return self.num_kv_heads * self.group_size

    def first_visible(self, position: int) -> int:
        """Return the first position that a query at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)


@dataclass(slots=True)
class Sequence:
    """One request. query: [L, H, D], the step's rows. key, value: [S, K, D], all tokens."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Heads:
    """One request in float32, a KV head for each head. query: [H, L, D]. key, value: [H, S, D]. visible: [L, S]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor


@dataclass(slots=True)
class Sequences:
    """The requests of a case, and the parameters of the layer."""

    case: AttentionCase
    requests: list[Sequence]
    params: AttentionParams

    @classmethod
    def random(cls, case: AttentionCase) -> "Sequences":
        """Draw normal queries, keys and values."""
        inputs = Inputs(case.dtype, case.seed)
        return cls(case, [_random(case, inputs, *request) for request in case.requests], _params(case, inputs))

    @classmethod
    def needles(cls, case: AttentionCase, targets: tuple[int, ...]) -> "Sequences":
        """Make requests of one query each, whose answer is at position `targets[request]`."""
        inputs = Inputs(case.dtype, case.seed)
        pairs = zip(case.requests, targets, strict=True)
        found = [_needle(case, inputs, seq_len, target) for (_, seq_len), target in pairs]
        return cls(case, found, _params(case, inputs))

    @classmethod
    def stairs(cls, case: AttentionCase) -> "Sequences":
        """Make requests whose last keys fit ever better: each row's answer is its own key, the next is a trap."""
        inputs = Inputs(case.dtype, case.seed)
        return cls(case, [_stairs(case, inputs, *request) for request in case.requests], _params(case, inputs))

    @classmethod
    def of(cls, case: AttentionCase, requests: list[Sequence]) -> "Sequences":
        """Take sequences that the caller made."""
        return cls(case, requests, _params(case, Inputs(case.dtype, case.seed)))

    def exact(self) -> torch.Tensor:
        """Attend in float64 to what the cache holds of keys and values. Returns [T, H, D]."""
        return self._attend("float64")

    def declared(self) -> list[torch.Tensor]:
        """Attend as the reference does, in the case's dtype, in the ways that rounding leaves open.

        As it is; with the elements of heads, and the keys of single queries, summed in another order; with scores one
        rounding step larger and smaller; block by block, with weights of as many bits as the device multiplies in; and
        with torch's fused kernel; and with every sum taken term by term.
        """
        step = torch.finfo(torch.float32).eps
        scaled = [replace(self.params, scale=self.params.scale * (1 + sign * step)) for sign in (1, -1)]
        others = [self._with_other_keys_first(seed) for seed in range(_NUM_KEY_ORDERS)]
        runs = [self, self._reordered(), *others, *(replace(self, params=params) for params in scaled)]
        outputs = [run._attend(self.case.dtype) for run in runs]
        outputs[1] = outputs[1][..., self._order().argsort()]
        fused = [] if self.case.softcap is not None else [self._fused()]
        return [*outputs, self._by_blocks(), *fused, self._term_by_term()]

    def with_key(self, request: int, position: int, key: torch.Tensor, value: torch.Tensor) -> "Sequences":
        """Return a copy in which one token's key and value are other ones."""
        changed = [Sequence(s.query, s.key.clone(), s.value.clone()) for s in self.requests]
        changed[request].key[position], changed[request].value[position] = key, value
        return replace(self, requests=changed)

    def _order(self) -> torch.Tensor:
        return torch.randperm(self.case.head_dim, generator=torch.Generator().manual_seed(1))

    def _reordered(self) -> "Sequences":
        """Return the sequences with the elements of all heads in another order."""
        order = self._order()
        found = [Sequence(s.query[..., order], s.key[..., order], s.value[..., order]) for s in self.requests]
        return replace(self, requests=found)

    def _with_other_keys_first(self, seed: int) -> "Sequences":
        """Return the sequences with the visible keys of single queries in another order."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for s in self.requests:
            order = torch.arange(len(s.key))
            first = self.case.first_visible(len(s.key) - 1)
            order[first:] = first + torch.randperm(len(s.key) - first, generator=generator)
            found.append(Sequence(s.query, s.key[order], s.value[order]) if len(s.query) == 1 else s)
        return replace(self, requests=found)

    def _term_by_term(self) -> torch.Tensor:
        """Attend with float32 sums over elements and over keys that add one term after the other."""
        outputs = []
        for heads in map(self._heads, self.requests):
            scores = torch.zeros(*heads.query.shape[:2], heads.key.shape[1])
            for element in range(heads.query.shape[2]):
                scores += heads.query[:, :, element, None] * heads.key[:, None, :, element]
            scores *= self.params.scale
            if self.case.softcap is not None:
                scores = self.case.softcap * torch.tanh(scores / self.case.softcap)
            scores = scores.masked_fill(~heads.visible, -torch.inf)
            peak = scores.amax(-1, keepdim=True)
            weights = (scores - peak).exp()
            total = torch.zeros_like(peak)
            if self.params.sinks is not None:
                total = (self.params.sinks.float()[:, None, None] - peak).exp()
            output = torch.zeros_like(heads.query)
            for key in range(heads.key.shape[1]):
                total = total + weights[:, :, key, None]
                output += weights[:, :, key, None] * heads.value[:, None, key]
            outputs.append((output / total).transpose(0, 1).to(torch_dtype(self.case.dtype)))
        return torch.cat(outputs)

    def _by_blocks(self) -> torch.Tensor:
        """Attend as kernels do: weights in the dtype in which the device multiplies, products added block by block."""
        case, narrow, outputs = self.case, torch_dtype(self.case.compute), []
        for heads in map(self._heads, self.requests):
            scores = heads.query @ heads.key.mT * self.params.scale
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            scores = scores.masked_fill(~heads.visible, -torch.inf)
            total = scores.logsumexp(-1, keepdim=True)
            if self.params.sinks is not None:
                total = torch.logaddexp(total, self.params.sinks.float()[:, None, None])
            weights = (scores - total).exp().to(narrow).float()
            output = torch.zeros_like(heads.query)
            parts = zip(torch.split(weights, _KEY_BLOCK, -1), torch.split(heads.value, _KEY_BLOCK, 1), strict=True)
            for some, others in parts:
                output += some @ others
            outputs.append(output.transpose(0, 1).to(torch_dtype(case.dtype)))
        return torch.cat(outputs)

    def _fused(self) -> torch.Tensor:
        """Attend with torch's fused kernel, whose quick exponential costs some accuracy. It knows no soft cap."""
        outputs = []
        for heads in map(self._heads, self.requests):
            mask = torch.zeros(heads.visible.shape).masked_fill(~heads.visible, -torch.inf)
            key, value = heads.key, heads.value
            if self.params.sinks is not None:
                key, value = functional.pad(key, (0, 0, 0, 1)), functional.pad(value, (0, 0, 0, 1))
                sinks = self.params.sinks.float()[:, None, None].expand(-1, len(mask), 1)
                mask = torch.cat((mask.expand(len(key), -1, -1), sinks), dim=-1)
            output = functional.scaled_dot_product_attention(
                heads.query[None], key[None], value[None], attn_mask=mask, scale=self.params.scale
            )[0]
            outputs.append(output.transpose(0, 1).to(torch_dtype(self.case.dtype)))
        return torch.cat(outputs)

    def _heads(self, sequence: Sequence) -> _Heads:
        """Widen a request to float32, head by head, its keys and values as the cache holds them."""
        kept = [held(part, self.case.stored, torch.float32) for part in (sequence.key, sequence.value)]
        key, value = (part.repeat_interleave(self.case.group_size, 1).transpose(0, 1) for part in kept)
        length, num_queries = len(sequence.key), len(sequence.query)
        distance = torch.arange(length - num_queries, length)[:, None] - torch.arange(length)
        visible = (distance >= 0) & (distance < (self.case.window or length))
        return _Heads(sequence.query.float().transpose(0, 1), key, value, visible)

    def _attend(self, dtype: str) -> torch.Tensor:
        """Lay each request out in one block of the reference's cache, and attend."""
        wanted, cache_dtype = torch_dtype(dtype), dtype
        if dtype != "float64":
            cache_dtype = "float32" if self.case.stored == CODED else self.case.stored
        wide = torch_dtype(cache_dtype)
        sinks = self.params.sinks
        params = replace(self.params, sinks=None if sinks is None else sinks.to(wanted))
        outputs = []
        for sequence in self.requests:
            length = len(sequence.key)
            spec = FullAttentionSpec((0,), self.case.num_kv_heads, self.case.head_dim, length, cache_dtype)
            backend = ReferenceAttention()
            group = KVGroup(spec, backend.kv_layout(spec))
            arena = KVArena(group.layout.block_bytes, 1, (group,))
            (cache,) = backend.bind(arena, 0, torch.zeros(arena.num_bytes, dtype=torch.uint8))
            cache[0, 0], cache[0, 1] = (held(part, self.case.stored, wide) for part in (sequence.key, sequence.value))
            prepared = backend.prepare(_one_block(len(sequence.query), length, self.case.window))
            outputs.append(backend.attend(sequence.query.to(wanted), cache, prepared, params))
        return torch.cat(outputs)


def _one_block(num_queries: int, length: int, window: int | None) -> AttentionBatch:
    return AttentionBatch(
        query_start=np.array([0, num_queries], dtype=np.int32),
        seq_lens=np.array([length], dtype=np.int32),
        block_table=np.zeros((1, 1), dtype=np.int32),
        slots=np.arange(length - num_queries, length),
        block_size=length,
        window=window,
    )


def _params(case: AttentionCase, inputs: Inputs) -> AttentionParams:
    sinks = inputs.normal(case.num_heads) if case.sinks else None
    return AttentionParams(case.head_dim**-0.5, case.window, case.softcap, sinks)


def _random(case: AttentionCase, inputs: Inputs, num_queries: int, length: int) -> Sequence:
    kept = (length, case.num_kv_heads, case.head_dim)
    return Sequence(
        inputs.normal(num_queries, case.num_heads, case.head_dim), inputs.normal(*kept), inputs.normal(*kept)
    )


def _needle(case: AttentionCase, inputs: Inputs, length: int, target: int) -> Sequence:
    sequence, direction = _decoys(case, inputs, 1, length)
    sequence.key[target] = direction * _strength(case)
    sequence.value[target] = inputs.normal(case.num_kv_heads, case.head_dim)
    first = case.first_visible(length - 1)
    if first:
        sequence.key[first - 1] = direction * (2 * _strength(case))
    return sequence


def _stairs(case: AttentionCase, inputs: Inputs, num_queries: int, length: int) -> Sequence:
    sequence, direction = _decoys(case, inputs, num_queries, length)
    for row in range(num_queries):
        position = length - num_queries + row
        sequence.key[position] = direction * (_strength(case) * (1 + row / 2))
        if row % 2 == 0:
            sequence.value[position] = inputs.normal(case.num_kv_heads, case.head_dim)
    return sequence


def _decoys(case: AttentionCase, inputs: Inputs, num_queries: int, length: int) -> tuple[Sequence, torch.Tensor]:
    """Draw a sequence of decoys, and the direction of its queries by KV head, [K, D]."""
    kept = (length, case.num_kv_heads, case.head_dim)
    direction = inputs.signs(case.num_kv_heads, case.head_dim)
    query = direction.repeat_interleave(case.group_size, 0).expand(num_queries, -1, -1).clone()
    value = inputs.normal(*kept, scale=DECOY_SIZE)
    return Sequence(query, inputs.signs(*kept), value), direction


def _strength(case: AttentionCase) -> float:
    """Return the size of a key's elements at which its scaled score is the needle's."""
    return NEEDLE_SCORE / math.sqrt(case.head_dim)
