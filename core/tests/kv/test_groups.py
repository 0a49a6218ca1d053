"""Retention rules against brute force over positions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.control_plane import full, sliding
from zif.contract import KVSpec
from zif.errors import ContractError
from zif.kv.groups import NEVER, layer_group

SIZES = st.integers(1, 9)
WINDOWS = st.integers(1, 40)
COUNTS = st.integers(0, 100)


def visible(position, window):
    """Return the positions that the token at `position` sees, straight from the contract's words."""
    return [p for p in range(position + 1) if window is None or p >= position - window + 1]


def spec_of(window, block_size):
    return full(block_size) if window is None else sliding(window, block_size)


@given(st.none() | WINDOWS, SIZES, COUNTS)
def test_first_visible_block_holds_the_first_visible_position(window, block_size, num_computed):
    group = layer_group(spec_of(window, block_size))
    assert group.first_visible_block(num_computed) == visible(num_computed, window)[0] // block_size


@given(WINDOWS, SIZES, COUNTS)
def test_next_release_is_the_first_count_at_which_another_block_is_out_of_sight(window, block_size, num_computed):
    group = layer_group(sliding(window, block_size))
    now = visible(num_computed, window)[0] // block_size
    later = num_computed + 1
    while visible(later, window)[0] // block_size == now:
        later += 1
    assert group.next_release(num_computed) == later


def test_full_attention_never_releases():
    assert layer_group(full()).next_release(10**6) == NEVER


@given(st.none() | WINDOWS, SIZES, st.lists(st.booleans(), max_size=16))
def test_longest_prefix_is_the_longest_that_brute_force_accepts(window, block_size, found):
    def serves(num_blocks):
        end = num_blocks * block_size
        return all(found[p // block_size] for p in visible(end, window) if p < end)

    expected = max(count for count in range(len(found) + 1) if serves(count))
    assert layer_group(spec_of(window, block_size)).longest_prefix(len(found), found.__getitem__) == expected


@given(st.none() | WINDOWS, SIZES, st.integers(1, 60), st.integers(1, 20), st.data())
def test_peak_blocks_bounds_what_any_chunking_holds(window, block_size, num_tokens, max_step_tokens, data):
    group = layer_group(spec_of(window, block_size))
    computed, peak = 0, 0
    while computed < num_tokens:
        end = min(num_tokens, computed + data.draw(st.integers(1, max_step_tokens)))
        peak = max(peak, (end - 1) // block_size - visible(computed, window)[0] // block_size + 1)
        computed = end
    assert peak <= group.peak_blocks(num_tokens, max_step_tokens) <= group.num_blocks(num_tokens)


def test_a_kind_without_a_rule_is_refused():
    class Recurrent(KVSpec):
        kind = "recurrent"

    with pytest.raises(ContractError, match="recurrent"):
        layer_group(Recurrent((0,), 1, 8, 4, "float32"))
