"""The null runner: writes each token's word into its slot and hashes what it reads back through the block tables.

It stores and reads exactly the slots that attention would. A wrong block id, a block freed too early, a stale row or
a missed write gives other words, hence another next token, and `expected_token` tells which one was right.
"""

from dataclasses import dataclass

import numpy as np

from zif.contract import (
    BlockUpdate,
    CompletedStep,
    EngineConfig,
    KVArena,
    KVSpec,
    ModelDescription,
    ModelRunner,
    Progress,
    RecurrentStateSpec,
    RequestStart,
    StepFuture,
    StepPlan,
    StepResult,
)
from zif.null.platform import SLOT_BYTES

Words = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(words: Words) -> Words:
    """Scramble 64-bit words, one by one (the finalizer of SplitMix64; Steele, Lea and Flood, 2014)."""
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    return words ^ (words >> np.uint64(31))


def token_words(token_ids: Words, positions: Words) -> Words:
    """Return the word of each token at its position."""
    return mix(token_ids + mix(positions * _GOLDEN + _GOLDEN))


def next_token(visible: list[Words], vocab_size: int) -> int:
    """Hash what each layer group sees into the next token."""
    digest: Words = np.zeros(1, dtype=np.uint64)
    for words in visible:
        digest = mix((digest ^ words.sum(dtype=np.uint64)) + _GOLDEN)
    return int(digest[0] % np.uint64(vocab_size))


def expected_token(token_ids: list[int], specs: tuple[KVSpec, ...], vocab_size: int) -> int:
    """Return the token that follows `token_ids`, computed without blocks: the oracle of every test on this platform."""
    tokens = np.asarray(token_ids, dtype=np.uint64)
    words = token_words(tokens, np.arange(len(tokens), dtype=np.uint64))
    visible = [
        words.sum(dtype=np.uint64, keepdims=True)
        if isinstance(spec, RecurrentStateSpec)
        else words[spec.first_needed_token(len(tokens) - 1) :]
        for spec in specs
    ]
    return next_token(visible, vocab_size)


@dataclass(slots=True)
class _Sequence:
    token_ids: list[int]
    tables: tuple[list[int], ...]


class NullRunner(ModelRunner):
    """Compute nothing, faithfully."""

    def __init__(self, config: EngineConfig) -> None:
        self._sequences: dict[int, _Sequence] = {}
        self._specs: tuple[KVSpec, ...] = ()
        self._memory: Words = np.zeros(0, dtype=np.uint64)
        self._vocab_size = 0

    def load(self, model: ModelDescription, progress: Progress) -> None:
        self._vocab_size = model.vocab_size
        progress(1, 1)

    def start(self, arena: KVArena) -> None:
        """View one stretch of words as every group's cells, so that groups can trample on each other as bytes would."""
        self._memory = np.zeros(arena.num_bytes // SLOT_BYTES, dtype=np.uint64)
        self._specs = tuple(group.spec for group in arena.groups)

    def submit(self, step: StepPlan) -> StepFuture:
        for request_id in step.released:
            self._sequences.pop(request_id, None)
        for start in step.started:
            self._start(start)
        for update in step.block_updates:
            self._extend(update)
        rows = list(zip(step.request_ids, step.num_computed, step.num_tokens, strict=True))
        # All rows write before any reads, as a layer of a model does: a row that tramples on another shows at once.
        for request_id, num_computed, num_tokens in rows:
            self._write(self._sequences[request_id], num_computed, num_computed + num_tokens)
        sampled = [
            [self._sample(self._sequences[request_id], num_computed + num_tokens)] if samples else []
            for (request_id, num_computed, num_tokens), samples in zip(rows, step.samples, strict=True)
        ]
        return CompletedStep(StepResult(step.step, sampled))

    def close(self) -> None:
        self._sequences.clear()
        self._memory = np.zeros(0, dtype=np.uint64)

    def _start(self, start: RequestStart) -> None:
        assert start.request_id not in self._sequences, f"request {start.request_id} is started twice"
        self._sequences[start.request_id] = _Sequence(start.token_ids, start.block_ids)

    def _extend(self, update: BlockUpdate) -> None:
        table = self._sequences[update.request_id].tables[update.group]
        assert len(table) == update.start, f"request {update.request_id}: blocks {update.start} do not follow"
        table.extend(update.block_ids)

    def _write(self, sequence: _Sequence, start: int, end: int) -> None:
        tokens = np.asarray(sequence.token_ids[start:end], dtype=np.uint64)
        words = token_words(tokens, np.arange(start, end, dtype=np.uint64))
        for group, spec in enumerate(self._specs):
            if isinstance(spec, RecurrentStateSpec):
                state = words.sum(dtype=np.uint64, keepdims=True)
                if start:
                    state = state + self._visible(sequence, group, start)
                self._memory[self._state_slot(sequence, group, end)] = state[0]
            else:
                self._memory[self._slots(sequence, group, start, end)] = words

    def _sample(self, sequence: _Sequence, end: int) -> int:
        visible = [self._visible(sequence, group, end) for group in range(len(self._specs))]
        token_id = next_token(visible, self._vocab_size)
        sequence.token_ids.append(token_id)
        return token_id

    def _visible(self, sequence: _Sequence, group: int, end: int) -> Words:
        """Read what the token at `end - 1` sees of one group."""
        spec = self._specs[group]
        if isinstance(spec, RecurrentStateSpec):
            slot = self._state_slot(sequence, group, end)
            return self._memory[slot : slot + 1]
        return self._memory[self._slots(sequence, group, spec.first_needed_token(end - 1), end)]

    def _state_slot(self, sequence: _Sequence, group: int, num_tokens: int) -> int:
        """Return where the state after `num_tokens` tokens is kept: in the first slot of its block."""
        size = self._specs[group].block_size
        return sequence.tables[group][(num_tokens - 1) // size] * size

    def _slots(
        self, sequence: _Sequence, group: int, start: int, end: int
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        size = self._specs[group].block_size
        first = start // size
        blocks = np.asarray(sequence.tables[group][first : -(-end // size)], dtype=np.int64)
        slots = (blocks[:, None] * size + np.arange(size)).reshape(-1)
        return slots[start - first * size : end - first * size]
