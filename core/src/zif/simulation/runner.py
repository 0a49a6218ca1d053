"""A runner for simulations: stores and reads the words that the null platform would, at the cost of what changed.

Every token's word goes into its slot in every layer group, and what a token sees is read back through the block
tables. Reading everything at each step would cost the whole context; so a sum once read is kept, every slot counts the
sums that include it (its stakes), and a write into a slot with a stake makes every sum be read again. A block lent
twice, freed too early or missed therefore changes the text as it does on the null platform.

State groups (`KVSpec.keeps_checkpoints`) keep one state per block: a step from c to d tokens reads the block of token
c - 1 and writes the block of token d - 1.
"""

from array import array

from zif.contract import (
    BlockBytes,
    BlockUpdate,
    CompletedStep,
    Draft,
    KVArena,
    KVLayout,
    KVSpec,
    KVStore,
    ModelDescription,
    ModelRunner,
    Progress,
    RequestStart,
    StepFuture,
    StepPlan,
    StepResult,
    carry_out,
)
from zif.simulation.words import Words, encoder_word, fold, visibility

WORD_BYTES = 8
_STATE_WORDS = 3


def simulated_layout(spec: KVSpec) -> KVLayout:
    """Keep one word per token, or a few for a state: group sizes that are no multiples of each other."""
    words = _STATE_WORDS if spec.keeps_checkpoints else spec.block_size
    return KVLayout(words * WORD_BYTES, ("word",), (words,), "uint64")


class _Sequence:
    """What the runner holds of one request. `ends[g]` is None while the sum of group g is not kept."""

    __slots__ = ("ends", "epoch", "firsts", "media", "num_encoder_tokens", "sums", "tables", "token_ids")

    def __init__(self, start: RequestStart) -> None:
        self.token_ids = start.token_ids
        self.tables = start.block_ids
        self.media = start.media
        self.num_encoder_tokens = start.num_encoder_tokens
        self.sums = [0] * len(self.tables)
        self.firsts = [0] * len(self.tables)
        self.ends: list[int | None] = [None] * len(self.tables)
        self.epoch = 0


class _Group:
    """One layer group: where its words lie. Subclasses say what a step writes and what a token sees."""

    def __init__(self, index: int, spec: KVSpec, memory: "_Memory") -> None:
        self.index = index
        self.visibility = visibility(spec)
        self.size = spec.block_size
        self.memory = memory

    def write(self, sequence: _Sequence, start: int, end: int) -> None:
        raise NotImplementedError

    def read(self, sequence: _Sequence, end: int) -> int:
        raise NotImplementedError

    def forget(self, sequence: _Sequence) -> None:
        raise NotImplementedError

    def write_draft(self, sequence: _Sequence, start: int, end: int, spare: int) -> None:
        """Write tokens of which the last ones are guesses; a state goes into the block `spare`."""
        self.write(sequence, start, end)

    def read_draft(self, sequence: _Sequence, start: int, end: int) -> int:
        """Read what the token at `end - 1` sees, after a draft row that began at `start`."""
        self.forget(sequence)
        return self.read(sequence, end)

    def accept(self, sequence: _Sequence, end: int, spare: int) -> None:
        """Hear that all guesses of a row up to `end` were right."""


class _Memory:
    """The arena's words, their stakes, and the words of tokens."""

    def __init__(self, num_words: int, words: Words) -> None:
        self.cells = [0] * num_words
        self.stakes = [0] * num_words
        self.epoch = 0
        self.words = words


class _TokenGroup(_Group):
    """One word per token; a token sees the sum of the visible words."""

    def write(self, sequence: _Sequence, start: int, end: int) -> None:
        memory, size, index = self.memory, self.size, self.index
        cells, stakes, words, vocab_size = memory.cells, memory.stakes, memory.words.by_place, memory.words.vocab_size
        table, token_ids = sequence.tables[index], sequence.token_ids
        if sequence.ends[index] == start == end - 1:
            slot = table[start // size] * size + start % size
            if stakes[slot]:
                memory.epoch += 1
            stakes[slot] += 1
            cells[slot] = word = words[start * vocab_size + token_ids[start]]
            sequence.sums[index] += word
            sequence.ends[index] = end
            return
        self.forget(sequence)
        for position in range(start, end):
            slot = table[position // size] * size + position % size
            if stakes[slot]:
                memory.epoch += 1
            cells[slot] = words[position * vocab_size + token_ids[position]]

    def read(self, sequence: _Sequence, end: int) -> int:
        index, visible_from = self.index, self.visibility
        first = visible_from(end - 1) if visible_from else 0
        if sequence.ends[index] is None:
            self._keep(sequence, first, end)
        elif sequence.epoch != self.memory.epoch:
            sequence.sums[index] = sum(self.memory.cells[s] for s in self._slots(sequence, sequence.firsts[index], end))
        if visible_from is None:
            return sequence.sums[index]
        if first > sequence.firsts[index]:
            self._drop(sequence, first)
        visible = sequence.sums[index]
        # What the next token does not see may be given to others before that token is computed.
        following = visible_from(end)
        if following > first:
            self._drop(sequence, following)
        return visible

    def forget(self, sequence: _Sequence) -> None:
        index, stakes = self.index, self.memory.stakes
        end = sequence.ends[index]
        if end is not None:
            for slot in self._slots(sequence, sequence.firsts[index], end):
                stakes[slot] -= 1
            sequence.ends[index] = None

    def _keep(self, sequence: _Sequence, first: int, end: int) -> None:
        cells, stakes = self.memory.cells, self.memory.stakes
        slots = self._slots(sequence, first, end)
        for slot in slots:
            stakes[slot] += 1
        sequence.sums[self.index] = sum([cells[slot] for slot in slots])
        sequence.firsts[self.index], sequence.ends[self.index] = first, end

    def _drop(self, sequence: _Sequence, first: int) -> None:
        """Stop including what comes before `first`."""
        cells, stakes = self.memory.cells, self.memory.stakes
        for slot in self._slots(sequence, sequence.firsts[self.index], first):
            stakes[slot] -= 1
            sequence.sums[self.index] -= cells[slot]
        sequence.firsts[self.index] = first

    def _slots(self, sequence: _Sequence, first: int, end: int) -> list[int]:
        table, size = sequence.tables[self.index], self.size
        return [table[position // size] * size + position % size for position in range(first, end)]


class _StateGroup(_Group):
    """One state per block, folded over every token."""

    def write(self, sequence: _Sequence, start: int, end: int) -> None:
        self._put(self._slot(sequence, end), self.read_draft(sequence, start, end))

    def write_draft(self, sequence: _Sequence, start: int, end: int, spare: int) -> None:
        self._put(spare * _STATE_WORDS, self.read_draft(sequence, start, end))

    def read_draft(self, sequence: _Sequence, start: int, end: int) -> int:
        state = self.read(sequence, start) if start else 0
        words, vocab_size, token_ids = self.memory.words.by_place, self.memory.words.vocab_size, sequence.token_ids
        for position in range(start, end):
            state = fold(state, words[position * vocab_size + token_ids[position]])
        return state

    def accept(self, sequence: _Sequence, end: int, spare: int) -> None:
        table, block = sequence.tables[self.index], (end - 1) // self.size
        table.extend([0] * (block + 1 - len(table)))
        table[block] = spare

    def _put(self, slot: int, state: int) -> None:
        memory = self.memory
        if any(memory.stakes[slot : slot + _STATE_WORDS]):
            memory.epoch += 1
        memory.cells[slot : slot + _STATE_WORDS] = (state,) * _STATE_WORDS

    def read(self, sequence: _Sequence, end: int) -> int:
        slot = sequence.tables[self.index][(end - 1) // self.size] * _STATE_WORDS
        # The mean is the state only while nobody has written into any of its words.
        return sum(self.memory.cells[slot : slot + _STATE_WORDS]) // _STATE_WORDS

    def forget(self, sequence: _Sequence) -> None:
        """Nothing is kept."""

    def _slot(self, sequence: _Sequence, end: int) -> int:
        return sequence.tables[self.index][(end - 1) // self.size] * _STATE_WORDS


class _EncoderGroup(_Group):
    """One word per token of the encoder's input, written once and read afresh each time."""

    def write(self, sequence: _Sequence, start: int, end: int) -> None:
        if start:
            return
        for position, slot in enumerate(self._slots(sequence)):
            if self.memory.stakes[slot]:
                self.memory.epoch += 1
            self.memory.cells[slot] = encoder_word(sequence.media, position)

    def read(self, sequence: _Sequence, end: int) -> int:
        return sum(self.memory.cells[slot] for slot in self._slots(sequence))

    def forget(self, sequence: _Sequence) -> None:
        """Nothing is kept."""

    def _slots(self, sequence: _Sequence) -> list[int]:
        table, size = sequence.tables[self.index], self.size
        return [table[p // size] * size + p % size for p in range(sequence.num_encoder_tokens)]


class SimulatedRunner(ModelRunner):
    """Compute nothing, faithfully and fast. The arena's layouts must come from `simulated_layout`."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._memory = _Memory(0, words)
        self._groups: list[_Group] = []
        self._only_group: _TokenGroup | None = None
        self._sequences: dict[int, _Sequence] = {}
        self._block_words: list[int] = []
        self._store: KVStore | None = None

    @property
    def num_sequences(self) -> int:
        """Count the requests that the runner holds."""
        return len(self._sequences)

    def load(self, model: ModelDescription, progress: Progress) -> None:
        progress(1, 1)

    def start(self, arena: KVArena) -> None:
        self._memory = _Memory(arena.num_bytes // WORD_BYTES, self._words)
        self._groups = []
        for index, group in enumerate(arena.groups):
            assert group.layout == simulated_layout(group.spec), f"group {index} is not laid out for simulation"
            self._groups.append(_kind_of(group.spec)(index, group.spec, self._memory))
        self._block_words = [group.layout.shape[0] for group in arena.groups]
        only = self._groups[0] if len(self._groups) == 1 else None
        self._only_group = only if isinstance(only, _TokenGroup) and only.visibility is None else None

    def submit(self, step: StepPlan) -> StepFuture:
        for request_id in step.released:
            self._forget(request_id)
        for start in step.started:
            assert start.request_id not in self._sequences, f"request {start.request_id} is started twice"
            self._sequences[start.request_id] = _Sequence(start)
        for update in step.block_updates:
            self._extend(update)
        lost: list[int] = []
        if step.transfers:
            assert self._store is not None, "blocks are to be copied and there is no store"
            lost = carry_out(step.transfers, self._store, self)
        return CompletedStep(StepResult(step.step, self._compute(step), lost=lost))

    def attach_store(self, store: KVStore) -> bool:
        self._store = store
        return True

    def read_block(self, group: int, block_id: int) -> BlockBytes:
        """Return the words of a block as bytes."""
        words = self._block_words[group]
        return array("Q", self._memory.cells[block_id * words : (block_id + 1) * words]).tobytes()

    def write_block(self, group: int, block_id: int, data: BlockBytes) -> None:
        """Overwrite the words of a block."""
        first = block_id * self._block_words[group]
        end = first + self._block_words[group]
        if any(self._memory.stakes[first:end]):
            self._memory.epoch += 1
        self._memory.cells[first:end] = array("Q", bytes(data)).tolist()

    def close(self) -> None:
        self._sequences.clear()

    def _compute(self, step: StepPlan) -> list[list[int]]:
        sequences = self._sequences
        rows = [sequences[request_id] for request_id in step.request_ids]
        # All rows write before any reads, as a layer of a model does: a row that tramples on another shows at once.
        if step.total_tokens == len(rows) and not step.drafts and all(step.samples):
            return self._compute_singles(rows, step.num_computed)
        drafts = [step.drafts.get(request_id) for request_id in step.request_ids]
        columns = [*zip(rows, step.num_computed, step.num_tokens, step.samples, drafts, strict=True)]
        for sequence, computed, num_tokens, _, draft in columns:
            if draft is not None:
                self._write_draft(sequence, computed, num_tokens, draft)
                continue
            for group in self._groups:
                group.write(sequence, computed, computed + num_tokens)
        sampled: list[list[int]] = []
        for sequence, computed, num_tokens, samples, draft in columns:
            if draft is not None:
                sampled.append(self._verify(sequence, computed, num_tokens, draft))
            else:
                sampled.append([self._sample(sequence, computed + num_tokens)] if samples else [])
        return sampled

    def _compute_singles(self, rows: list[_Sequence], positions: list[int]) -> list[list[int]]:
        """Compute one token of each row and sample, as most steps do: `write` and `_sample`, with fewer calls."""
        memory, group, next_tokens = self._memory, self._only_group, self._words.next_tokens
        if group is None:
            for sequence, position in zip(rows, positions, strict=True):
                for each in self._groups:
                    each.write(sequence, position, position + 1)
            return [[self._sample(row, position + 1)] for row, position in zip(rows, positions, strict=True)]
        cells, stakes, words, vocab_size = memory.cells, memory.stakes, self._words.by_place, self._words.vocab_size
        size = group.size
        for sequence, position in zip(rows, positions, strict=True):
            if sequence.ends[0] != position:
                group.write(sequence, position, position + 1)
                continue
            slot = sequence.tables[0][position // size] * size + position % size
            if stakes[slot]:
                memory.epoch += 1
            stakes[slot] += 1
            cells[slot] = word = words[position * vocab_size + sequence.token_ids[position]]
            sequence.sums[0] += word
            sequence.ends[0] = position + 1
        sampled: list[list[int]] = []
        for sequence, position in zip(rows, positions, strict=True):
            if sequence.epoch != memory.epoch or sequence.ends[0] is None:
                sampled.append([self._sample(sequence, position + 1)])
                continue
            token = next_tokens[(sequence.sums[0],)]
            sequence.token_ids.append(token)
            sampled.append([token])
        return sampled

    def _sample(self, sequence: _Sequence, end: int) -> int:
        """Return the token after `end` tokens, known from now on."""
        sums = tuple([group.read(sequence, end) for group in self._groups])
        sequence.epoch = self._memory.epoch
        token = self._words.next_tokens[sums]
        sequence.token_ids.append(token)
        return token

    def _write_draft(self, sequence: _Sequence, computed: int, num_tokens: int, draft: Draft) -> None:
        """Write a row with guesses, which the sequence knows until they are verified."""
        sequence.token_ids += draft.token_ids
        for group, spare in zip(self._groups, draft.state_blocks, strict=True):
            group.write_draft(sequence, computed, computed + num_tokens, spare)

    def _verify(self, sequence: _Sequence, computed: int, num_tokens: int, draft: Draft) -> list[int]:
        """Return the guesses that are right and the token after them; the sequence forgets the others."""
        first = computed + num_tokens - len(draft.token_ids)
        sampled: list[int] = []
        while len(sampled) <= len(draft.token_ids) and sampled == draft.token_ids[: len(sampled)]:
            end = first + len(sampled)
            sums = tuple([group.read_draft(sequence, computed, end) for group in self._groups])
            sampled.append(self._words.next_token(sums))
        sequence.epoch = self._memory.epoch
        sequence.token_ids[first:] = sampled
        if len(sampled) == num_tokens:
            for group, spare in zip(self._groups, draft.state_blocks, strict=True):
                group.accept(sequence, computed + num_tokens, spare)
        return sampled

    def _extend(self, update: BlockUpdate) -> None:
        sequence = self._sequences[update.request_id]
        table = sequence.tables[update.group]
        if update.start < len(table):
            self._groups[update.group].forget(sequence)
        assert len(table) >= update.start, f"request {update.request_id}: blocks {update.start} do not follow"
        table[update.start :] = update.block_ids

    def _forget(self, request_id: int) -> None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            for group in self._groups:
                group.forget(sequence)


def _kind_of(spec: KVSpec) -> type[_Group]:
    if spec.counts_encoder_tokens:
        return _EncoderGroup
    return _StateGroup if spec.keeps_checkpoints else _TokenGroup
