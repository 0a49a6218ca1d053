"""Retention rules of every kind against brute force over positions, straight from the contract's words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.control_plane import KINDS, spec_of
from zif.contract import NEVER, RecurrentStateSpec

KIND = st.sampled_from(sorted(KINDS))
REACHES = st.integers(1, 40)
SIZES = st.integers(1, 9)
COUNTS = st.integers(0, 100)


def needed(kind, reach, num_computed):
    """Return the positions whose state the token at position `num_computed` needs, itself left out."""
    first = {
        "full": 0,
        "latent": 0,
        "sliding": num_computed - reach + 1,
        "chunked": num_computed - num_computed % reach,
        "recurrent": num_computed - 1,
    }[kind]
    return range(max(0, first), num_computed)


@given(KIND, REACHES, SIZES, COUNTS)
def test_first_needed_block_holds_the_first_needed_position(kind, reach, block_size, num_computed):
    spec = spec_of(kind, reach, block_size)
    positions = needed(kind, reach, num_computed)
    first = positions.start if kind != "recurrent" or num_computed else 0
    assert spec.first_needed_block(num_computed) == first // block_size


@given(KIND, REACHES, SIZES, COUNTS)
def test_next_release_is_the_first_count_at_which_another_block_is_not_needed(kind, reach, block_size, num_computed):
    spec = spec_of(kind, reach, block_size)
    if spec.next_release(num_computed) == NEVER:
        assert spec.first_needed_block(10**6) == 0
        return
    now = spec.first_needed_block(num_computed)
    later = num_computed + 1
    while spec.first_needed_block(later) == now:
        later += 1
    assert spec.next_release(num_computed) == later


@given(KIND, REACHES, SIZES, st.lists(st.booleans(), max_size=16))
def test_longest_prefix_is_the_longest_that_brute_force_accepts(kind, reach, block_size, found):
    def serves(num_blocks):
        return all(found[p // block_size] for p in needed(kind, reach, num_blocks * block_size))

    expected = max(count for count in range(len(found) + 1) if serves(count))
    assert spec_of(kind, reach, block_size).longest_prefix(len(found), found.__getitem__) == expected


@given(KIND, REACHES, SIZES, st.integers(1, 60), st.integers(1, 20), st.data())
def test_peak_blocks_bounds_what_any_chunking_holds(kind, reach, block_size, num_tokens, max_step_tokens, data):
    spec = spec_of(kind, reach, block_size)
    computed, peak = 0, 0
    table: list[bool] = []
    while computed < num_tokens:
        end = min(num_tokens, computed + data.draw(st.integers(1, max_step_tokens)))
        first = spec.first_written_block(len(table), end)
        table += [block >= first for block in range(len(table), spec.num_blocks(end))]
        peak = max(peak, sum(table))
        computed = end
        for block in range(spec.first_needed_block(computed)):
            table[block] = False
    assert peak <= spec.peak_blocks(num_tokens, max_step_tokens) <= spec.num_blocks(num_tokens)


@given(KIND, REACHES, SIZES, COUNTS)
def test_first_needed_token_never_falls(kind, reach, block_size, num_computed):
    spec = spec_of(kind, reach, block_size)
    assert spec.first_needed_token(num_computed) <= spec.first_needed_token(num_computed + 1)


@given(SIZES, st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_only_steps_that_end_at_a_blocks_end_leave_a_checkpoint(block_size, steps):
    spec = spec_of("recurrent", 1, block_size)
    assert isinstance(spec, RecurrentStateSpec)
    computed, reusable = 0, []
    for num_tokens in steps:
        reusable += spec.reusable_blocks(computed, computed + num_tokens)
        computed += num_tokens
    ends = {sum(steps[: i + 1]) for i in range(len(steps))}
    assert reusable == [end // block_size - 1 for end in sorted(ends) if end % block_size == 0]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_names_itself_and_its_feature(kind):
    spec = spec_of(kind, 4, 4)
    assert spec.kind
    assert spec.feature.value.split(".")[-1] in ("full", "latent", "sliding_window", "chunked_local", "recurrent")
