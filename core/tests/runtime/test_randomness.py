"""Random numbers by seed and position."""

import numpy as np
import pytest

from zif.runtime.randomness import draw_fractions, splitmix64, stream_state


def fractions(seeds, positions):
    states = np.array([stream_state(seed) for seed in seeds], dtype=np.uint64)
    return draw_fractions(states, np.array(positions, dtype=np.int64)) / 2.0**62


def test_splitmix64_gives_the_published_outputs():
    # Outputs of the authors' C code for the state 1234567, as quoted by the Rosetta Code page on SplitMix64.
    states = np.full(5, 1234567, dtype=np.uint64)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(states, np.arange(5)).tolist() == expected


def test_a_number_depends_on_its_own_seed_and_position_only():
    together = fractions([5, -5, 2**63 - 1], [7, 7, 1_000_000])
    alone = [fractions([seed], [position])[0] for seed, position in [(5, 7), (-5, 7), (2**63 - 1, 1_000_000)]]
    assert together.tolist() == alone
    assert len(set(alone)) == 3


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [([3] * 40_000, range(40_000)), (range(40_000), [11] * 40_000), (range(-20_000, 20_000), range(40_000))],
    ids=["along positions", "along seeds", "along both"],
)
def test_numbers_are_uniform_and_uncorrelated(seeds, positions):
    values = fractions(list(seeds), list(positions))
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.bincount((values * 100).astype(int), minlength=100)
    chi_square = float(((counts - 400) ** 2 / 400).sum())
    assert 60 < chi_square < 149  # 99 degrees of freedom: outside with probability below 0.002, seeds are fixed
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02


def test_seeds_one_increment_apart_do_not_give_shifted_streams():
    increment = 0x9E3779B97F4A7C15
    shifted = (12345 + increment) % 2**64
    first = fractions([12345] * 100, range(1, 101))
    second = fractions([shifted - 2**64 if shifted >= 2**63 else shifted] * 100, range(100))
    assert not np.array_equal(first, second)
