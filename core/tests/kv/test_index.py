"""The hash table of the prefix index against a dictionary, with keys that crowd into few slots."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zif.kv.index import PrefixIndex

NUM_CELLS = 12
NUM_SLOTS = 32


def crowded(name):
    """Return a digest whose key begins its search at one of the last three slots or the first one."""
    home = (NUM_SLOTS - 3 + name % 4) % NUM_SLOTS
    return (home + NUM_SLOTS * name).to_bytes(8, "little") + bytes(24)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, NUM_CELLS - 1), st.integers(1, 20)), max_size=120))
@settings(max_examples=200, deadline=None)
def test_every_search_ends_at_the_right_block_whatever_was_removed_before(calls):
    index, model = PrefixIndex(NUM_CELLS), {}
    for adds, block, name in calls:
        if adds:
            added = index.add(block, crowded(name), bytes([name]))
            assert added == (block not in model and name not in model.values())
            if added:
                model[block] = name
        elif block in model:
            index.remove(block, evicted=False)
            del model[block]
        index.check_integrity()
        by_name = {name: block for block, name in model.items()}
        assert [index.find(crowded(n), bytes([n])) for n in range(1, 21)] == [by_name.get(n) for n in range(1, 21)]
        assert [index.named(crowded(n)) for n in range(1, 21)] == [by_name.get(n) for n in range(1, 21)]
    assert sorted(index.blocks()) == sorted(model)
    assert len(index) == len(model)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=NUM_CELLS - 1, unique=True), st.data())
def test_a_run_is_what_single_searches_find_before_the_first_gap(names, data):
    index = PrefixIndex(NUM_CELLS)
    for block, name in enumerate(names, start=1):
        index.add(block, crowded(name), bytes([name]))
    asked = data.draw(st.lists(st.integers(1, 20), max_size=15))
    contents = [bytes([data.draw(st.sampled_from([name, name, name, 99]))]) for name in asked]
    digests = [crowded(name) for name in asked]
    found = [index.find(digest, content) for digest, content in zip(digests, contents, strict=True)]
    gap = found.index(None) if None in found else len(found)
    assert index.find_run(digests, contents) == found[:gap]


@pytest.mark.parametrize(
    "digest", [bytes(32), b"\1", b"", b"\1\2\3" + bytes(29)], ids=["zero", "short", "empty", "cut"]
)
def test_any_digest_names_a_block(digest):
    index = PrefixIndex(NUM_CELLS)
    assert index.find(digest, b"content") is None
    assert index.find_run([digest], [b"content"]) == []
    assert index.add(5, digest, b"content")
    assert index.find(digest, b"content") == 5
    assert index.find_run([digest, digest], [b"content", b"other"]) == [5]


def test_one_digest_names_one_content():
    index = PrefixIndex(NUM_CELLS)
    assert index.add(1, crowded(1), b"first")
    assert not index.add(2, crowded(1), b"second")
    index.remove(1, evicted=True)
    assert index.add(2, crowded(1), b"second")
    assert index.find(crowded(1), b"first") is None


def test_only_what_was_evicted_is_remembered_as_such():
    index = PrefixIndex(NUM_CELLS)
    for block, evicted in ((1, True), (2, False)):
        index.add(block, crowded(block), b"content")
        index.remove(block, evicted=evicted)
    assert [index.was_evicted(crowded(block)) for block in (1, 2, 3)] == [True, False, False]
