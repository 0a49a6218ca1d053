"""Random numbers that depend on seed and position only, so that batching, order and preemption never change a sample.

Not a stream with a state: the number of a position is computed from (seed, position) directly. The sampler calls it.
"""

import numpy as np
from numpy.typing import NDArray

FRACTION_BITS = 62
"""Random fractions are integers in [0, 2**62): positive in int64, the widest integer of torch devices."""

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def splitmix64(states: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return output number `positions` (from 0) of the SplitMix64 generators that start in `states`.

    The state of SplitMix64 advances by a constant, so any output is one multiplication away. Source: Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    z: NDArray[np.uint64] = states + (positions.astype(np.uint64) + np.uint64(1)) * _INCREMENT
    z = (z ^ (z >> np.uint64(30))) * _FACTORS[0]
    z = (z ^ (z >> np.uint64(27))) * _FACTORS[1]
    z ^= z >> np.uint64(31)
    return z


def stream_state(seed: int) -> np.uint64:
    """Return the start state of the stream of `seed` (any 64-bit integer).

    Seeds are scrambled first: neighbouring seeds, or seeds one increment apart, must not give shifted copies of one
    stream.
    """
    scrambled = splitmix64(np.array([seed % 2**64], dtype=np.uint64), np.zeros(1, dtype=np.int64))
    return np.uint64(scrambled[0])


def draw_fractions(states: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Draw one uniform fraction per stream. states, positions: [R]. Returns [R]: numerators over 2**62."""
    return (splitmix64(states, positions) >> np.uint64(64 - FRACTION_BITS)).astype(np.int64)
