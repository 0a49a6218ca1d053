"""The journal of blocks: whatever happens to the cache, adding up what was written gives what can be found."""

import pytest
from hypothesis import settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from kv.block_manager_machine import ARENAS, MAX_STEP_TOKENS, SETTINGS, BlockManagerMachine
from support.control_plane import Engine, cross, cut, full, new_request
from zif.contract import CacheKey
from zif.kv import PagedBlockManager
from zif.kv.hashing import PrefixChain
from zif.kv.journal import AllCleared, BlockJournal, BlocksRemoved, BlocksStored


class JournalMachine(BlockManagerMachine):
    """Adds what the journal says up, and compares it with the census after every call."""

    checks_integrity = False

    def manager_of(self, arena, caching):
        self.journal = BlockJournal()
        self.known: list[set[bytes]] = [set() for _ in arena.groups]
        return PagedBlockManager(
            arena, enable_prefix_caching=caching, max_step_tokens=MAX_STEP_TOKENS, journal=self.journal
        )

    @invariant()
    def the_journal_adds_up(self):
        if not hasattr(self, "manager"):
            return
        for event in self.journal.take():
            if isinstance(event, AllCleared):
                self.known = [set() for _ in self.known]
            elif isinstance(event, BlocksRemoved):
                assert self.known[event.group].issuperset(event.digests)
                self.known[event.group] -= set(event.digests)
            else:
                assert self.known[event.group].isdisjoint(event.digests)
                assert len(event.token_ids) == event.block_size * len(event.digests)
                self.known[event.group] |= set(event.digests)
        assert tuple(self.known) == self.manager.census()


@pytest.mark.slow
@pytest.mark.parametrize("family", ARENAS)
def test_the_journal_adds_up_whatever_happens(family):
    machine = type(f"Journal_{family}", (JournalMachine,), {"arenas": ARENAS[family]})
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=40))


def manager_and_journal(arena):
    journal = BlockJournal()
    return PagedBlockManager(arena, enable_prefix_caching=True, max_step_tokens=64, journal=journal), journal


def computed(manager, request):
    """Let a request be computed to its last token, and end."""
    manager.begin(request)
    assert manager.reserve(request, request.num_tokens)
    request.num_computed_tokens = request.num_tokens
    manager.commit(request)
    manager.release(request)


def test_a_prompt_is_one_entry_with_its_tokens_and_parents():
    manager, journal = manager_and_journal(cut((full(4),), 20))
    request = new_request(0, [*range(100, 114)])
    computed(manager, request)
    chain = PrefixChain(request, 4)
    (stored,) = journal.take()
    assert stored == BlocksStored(0, chain.digests(0, 3), None, [*range(100, 112)], 4)
    assert journal.take() == []
    longer = new_request(1, [*range(100, 114), 7, 8])
    computed(manager, longer)
    (stored,) = journal.take()
    assert (stored.parent, stored.token_ids) == (chain.digest(2), [112, 113, 7, 8])


def test_what_conditions_a_chain_is_named_and_not_told():
    manager, journal = manager_and_journal(cut((full(4),), 40))
    names = []
    for number, key in enumerate((CacheKey(), CacheKey(salt="secret"), CacheKey(salt="other"), CacheKey("x" * 12))):
        computed(manager, new_request(number, [*range(9)], cache_key=key))
        (stored,) = journal.take()
        assert stored.parent is None
        names.append(stored.condition)
    assert names[0] is None
    assert len(set(names)) == 4
    assert not any(b"secret" in name for name in names[1:])


def test_a_reset_is_one_entry():
    manager, journal = manager_and_journal(cut((full(4),), 20))
    computed(manager, new_request(0, [*range(14)]))
    manager.reset_prefix_cache()
    assert journal.take() == [AllCleared()]
    assert manager.census() == (set(),)


def test_encoders_outputs_are_not_in_it():
    manager, journal = manager_and_journal(cut((full(4), cross(4)), 40))
    computed(manager, new_request(0, [*range(14)], num_encoder_tokens=8, cache_key=CacheKey(media=("picture",))))
    assert {event.group for event in journal.take()} == {0}


def test_without_a_journal_nothing_is_kept():
    engine = Engine(cut((full(4),), 20))
    engine.add(new_request(0, [*range(14)]))
    engine.run()
    assert engine.blocks.census()[0]
