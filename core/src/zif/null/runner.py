"""The null runner: writes each token's word into its slot and hashes what it reads back through the block tables.

It stores and reads exactly the slots that attention would. A wrong block id, a block freed too early, a stale row or
a missed write gives other words, hence another next token, and `expected_token` tells which one was right.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from zif.contract import (
    NO_TOKEN_LEFT,
    BlockBytes,
    BlockUpdate,
    CompletedStep,
    Draft,
    EngineConfig,
    Grammars,
    GrammarState,
    HiddenRows,
    KVArena,
    KVSpec,
    KVStore,
    ModelDescription,
    ModelRunner,
    Progress,
    RecurrentStateSpec,
    RequestStart,
    StepFuture,
    StepPlan,
    StepResult,
    Transfers,
    carry_out,
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


def encoder_words(media: tuple[str, ...], num_tokens: int) -> Words:
    """Return the words of an encoder's input, which its name decides."""
    name = np.full(num_tokens, crc32("\n".join(media).encode()), dtype=np.uint64)
    return token_words(name, np.arange(num_tokens, dtype=np.uint64))


def next_token(visible: list[Words], vocab_size: int) -> int:
    """Hash what each layer group sees into the next token."""
    return int(_digest(visible)[0] % np.uint64(vocab_size))


def hidden_state(visible: list[Words], num_channels: int) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    """Hash what each layer group sees into numbers from -1 to 1."""
    words = mix(_digest(visible) + np.arange(1, num_channels + 1, dtype=np.uint64) * _GOLDEN)
    return (words >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)


def _digest(visible: list[Words]) -> Words:
    digest: Words = np.zeros(1, dtype=np.uint64)
    for words in visible:
        digest = mix((digest ^ words.sum(dtype=np.uint64)) + _GOLDEN)
    return digest


def allowed_tokens(mask: np.ndarray[tuple[int], np.dtype[np.int32]], vocab_size: int) -> list[int]:
    """Return the tokens whose bits are set, rising. mask: [W]."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size]
    return np.flatnonzero(bits).tolist()


def expected_token(
    token_ids: list[int],
    specs: tuple[KVSpec, ...],
    vocab_size: int,
    media: tuple[str, ...] = (),
    num_encoder_tokens: int = 0,
) -> int:
    """Return the token that follows `token_ids`, computed without blocks: the oracle of every test on this platform."""
    return next_token(expected_visible(token_ids, specs, media, num_encoder_tokens), vocab_size)


def expected_visible(
    token_ids: list[int], specs: tuple[KVSpec, ...], media: tuple[str, ...] = (), num_encoder_tokens: int = 0
) -> list[Words]:
    """Return what each layer group sees from the last of `token_ids`, computed without blocks."""
    tokens = np.asarray(token_ids, dtype=np.uint64)
    words = token_words(tokens, np.arange(len(tokens), dtype=np.uint64))
    return [
        encoder_words(media, num_encoder_tokens)
        if spec.counts_encoder_tokens
        else words.sum(dtype=np.uint64, keepdims=True)
        if isinstance(spec, RecurrentStateSpec)
        else words[spec.first_needed_token(len(tokens) - 1) :]
        for spec in specs
    ]


@dataclass(slots=True)
class _Sequence:
    token_ids: list[int]
    tables: tuple[list[int], ...]
    media: tuple[str, ...]
    num_encoder_tokens: int
    num_prompt_tokens: int
    grammar: GrammarState | None
    hidden: HiddenRows | None


@dataclass(frozen=True, slots=True)
class _Row:
    """What a step computes of one sequence: tokens `start` to `end - 1`, the last ones guessed if there is a draft."""

    sequence: _Sequence
    start: int
    end: int
    draft: Draft | None

    @property
    def wants_hidden(self) -> bool:
        """Say whether hidden states of this row are asked for."""
        wanted = self.sequence.hidden
        return wanted is HiddenRows.ALL or (wanted is HiddenRows.LAST and self.end == len(self.sequence.token_ids))

    def words(self, end: int) -> Words:
        """Return the words of the row's tokens up to `end - 1`."""
        token_ids = self.sequence.token_ids[self.start : end]
        if self.draft:
            token_ids += self.draft.token_ids[: end - self.start - len(token_ids)]
        return token_words(np.asarray(token_ids, dtype=np.uint64), np.arange(self.start, end, dtype=np.uint64))


class NullRunner(ModelRunner):
    """Compute nothing, faithfully."""

    def __init__(self, config: EngineConfig) -> None:
        self._sequences: dict[int, _Sequence] = {}
        self._specs: tuple[KVSpec, ...] = ()
        self._memory: Words = np.zeros(0, dtype=np.uint64)
        self._block_words: tuple[int, ...] = ()
        self._store: KVStore | None = None
        self._grammars: Grammars | None = None
        self._vocab_size = 0
        self._num_channels = 0

    @property
    def max_steps_in_flight(self) -> int:
        """Nothing is ever under way, but planning ahead is part of what this platform is there to exercise."""
        return 2

    def load(self, model: ModelDescription, progress: Progress) -> None:
        self._vocab_size = model.vocab_size
        self._num_channels = model.config.get("hidden_size", 8)
        progress(1, 1)

    def start(self, arena: KVArena) -> None:
        """View one stretch of words as every group's cells, so that groups can trample on each other as bytes would."""
        self._memory = np.zeros(arena.num_bytes // SLOT_BYTES, dtype=np.uint64)
        self._specs = tuple(group.spec for group in arena.groups)
        self._block_words = tuple(group.layout.block_bytes // SLOT_BYTES for group in arena.groups)

    def attach_store(self, store: KVStore) -> bool:
        self._store = store
        return True

    def attach_grammars(self, grammars: Grammars) -> bool:
        self._grammars = grammars
        return True

    def read_block(self, group: int, block_id: int) -> BlockBytes:
        """Return the words of a block as bytes."""
        return self._block(group, block_id).tobytes()

    def write_block(self, group: int, block_id: int, data: BlockBytes) -> None:
        """Overwrite the words of a block."""
        self._block(group, block_id)[:] = np.frombuffer(data, dtype=np.uint64)

    @property
    def reports_hidden(self) -> bool:
        return True

    @property
    def verifies_drafts(self) -> bool:
        return True

    def submit(self, step: StepPlan) -> StepFuture:
        for request_id in step.released:
            self._sequences.pop(request_id, None)
        for start in step.started:
            self._start(start)
        for update in step.block_updates:
            self._extend(update)
        lost = self._carry_out(step.transfers) if step.transfers else []
        columns = zip(step.request_ids, step.num_computed, step.num_tokens, strict=True)
        rows = [
            _Row(self._sequences[request_id], num_computed, num_computed + num_tokens, step.drafts.get(request_id))
            for request_id, num_computed, num_tokens in columns
        ]
        # All rows write before any reads, as a layer of a model does: a row that tramples on another shows at once.
        for row in rows:
            self._write(row)
        sampled = [self._sample(row) if samples else [] for row, samples in zip(rows, step.samples, strict=True)]
        hidden = {i: self._hidden(row) for i, row in zip(step.request_ids, rows, strict=True) if row.wants_hidden}
        return CompletedStep(StepResult(step.step, sampled, faults=self._faults(step), lost=lost, hidden=hidden))

    def close(self) -> None:
        self._sequences.clear()
        self._memory = np.zeros(0, dtype=np.uint64)

    def _carry_out(self, transfers: Transfers) -> list[int]:
        assert self._store is not None, "blocks are to be copied and no store is attached"
        return carry_out(transfers, self._store, self)

    def _block(self, group: int, block_id: int) -> Words:
        words = self._block_words[group]
        return self._memory[block_id * words : (block_id + 1) * words]

    def _start(self, start: RequestStart) -> None:
        assert start.request_id not in self._sequences, f"request {start.request_id} is started twice"
        form = start.sampling.structured
        assert form is None or self._grammars is not None, "a request has a form and no grammars are attached"
        self._sequences[start.request_id] = _Sequence(
            start.token_ids,
            start.block_ids,
            start.media,
            start.num_encoder_tokens,
            start.num_prompt_tokens,
            None if form is None or self._grammars is None else self._grammars.begin(form),
            start.hidden,
        )

    def _extend(self, update: BlockUpdate) -> None:
        table = self._sequences[update.request_id].tables[update.group]
        assert len(table) >= update.start, f"request {update.request_id}: blocks {update.start} do not follow"
        table[update.start :] = update.block_ids

    def _write(self, row: "_Row") -> None:
        for group, spec in enumerate(self._specs):
            if spec.counts_encoder_tokens:
                if not row.start:
                    self._write_encoded(row.sequence, group)
            elif isinstance(spec, RecurrentStateSpec):
                slot = self._state_slot(row, group, row.end)
                self._memory[slot : slot + 1] = self._state(row, group, row.end)
            else:
                self._memory[self._slots(row.sequence, group, row.start, row.end)] = row.words(row.end)

    def _write_encoded(self, sequence: _Sequence, group: int) -> None:
        num_tokens = sequence.num_encoder_tokens
        self._memory[self._slots(sequence, group, 0, num_tokens)] = encoder_words(sequence.media, num_tokens)

    def _sample(self, row: "_Row") -> list[int]:
        """Return the accepted part of the row's draft and the token after it, all of them known from now on."""
        guesses = row.draft.token_ids if row.draft else []
        choices = self._choices(row.sequence, guesses)
        sampled: list[int] = []
        while sampled == guesses[: len(sampled)]:
            end = row.end - len(guesses) + len(sampled)
            visible = [self._visible(row, group, end) for group in range(len(self._specs))]
            allowed = choices[len(sampled)] if choices else range(self._vocab_size)
            sampled.append(allowed[next_token(visible, len(allowed))] if allowed else 0)
        row.sequence.token_ids.extend(sampled)
        if row.draft and len(sampled) > len(guesses):
            self._keep_states(row, row.draft)
        return sampled

    def _hidden(self, row: "_Row") -> bytes:
        """Return the hidden states of a row, of its last token or of all."""
        first = row.start if row.sequence.hidden is HiddenRows.ALL else row.end - 1
        groups = range(len(self._specs))
        visible = ([self._visible(row, group, end) for group in groups] for end in range(first + 1, row.end + 1))
        return b"".join(hidden_state(words, self._num_channels).astype("<f4").tobytes() for words in visible)

    def _choices(self, sequence: _Sequence, guesses: list[int]) -> list[list[int]]:
        """Return the tokens that the form of the answer allows, now and after each guess; empty without a form."""
        state = sequence.grammar
        if state is None:
            return []
        state.follow(sequence.token_ids[sequence.num_prompt_tokens + state.num_followed :])
        masks = np.empty((1 + len(guesses), (self._vocab_size + 31) // 32), dtype=np.int32)
        state.fill_masks(guesses, masks)
        return [allowed_tokens(mask, self._vocab_size) for mask in masks]

    def _faults(self, step: StepPlan) -> dict[int, str]:
        """Say which requests' forms allow no token."""
        states = [(request_id, self._sequences[request_id].grammar) for request_id in step.request_ids]
        return {number: f"{NO_TOKEN_LEFT}: {state.fault}" for number, state in states if state and state.fault}

    def _keep_states(self, row: "_Row", draft: Draft) -> None:
        """Put the states after an accepted draft into the block tables."""
        for group, spec in enumerate(self._specs):
            if isinstance(spec, RecurrentStateSpec):
                table, block = row.sequence.tables[group], (row.end - 1) // spec.block_size
                table.extend([0] * (block + 1 - len(table)))
                table[block] = draft.state_blocks[group]

    def _visible(self, row: "_Row", group: int, end: int) -> Words:
        """Read what the token at `end - 1`, one of the row's, sees of one group."""
        spec = self._specs[group]
        if spec.counts_encoder_tokens:
            return self._memory[self._slots(row.sequence, group, 0, row.sequence.num_encoder_tokens)]
        if isinstance(spec, RecurrentStateSpec):
            if end < row.end:
                return self._state(row, group, end)
            slot = self._state_slot(row, group, end)
            return self._memory[slot : slot + 1]
        return self._memory[self._slots(row.sequence, group, spec.first_needed_token(end - 1), end)]

    def _state(self, row: "_Row", group: int, end: int) -> Words:
        """Compute the state of one group after `end` tokens from the one before the row."""
        state: Words = row.words(end).sum(dtype=np.uint64, keepdims=True)
        if row.start:
            state += self._memory[self._state_slot(row, group, row.start)]
        return state

    def _state_slot(self, row: "_Row", group: int, num_tokens: int) -> int:
        """Return where the state after `num_tokens` tokens is kept: in the first slot of its block."""
        size = self._specs[group].block_size
        if row.draft and num_tokens == row.end:
            return row.draft.state_blocks[group] * size
        return row.sequence.tables[group][(num_tokens - 1) // size] * size

    def _slots(
        self, sequence: _Sequence, group: int, start: int, end: int
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        size = self._specs[group].block_size
        first = start // size
        blocks = np.asarray(sequence.tables[group][first : -(-end // size)], dtype=np.int64)
        slots = (blocks[:, None] * size + np.arange(size)).reshape(-1)
        return slots[start - first * size : end - first * size]
