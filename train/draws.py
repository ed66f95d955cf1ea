"""Random numbers of the generated scenes: words of Philox at explicit counters, and how they become numbers.

Determinism: numpy guarantees the words of a bit generator for ever, not the methods of `Generator`; and nothing here
calls a function of the C library. So the numbers are the same with every numpy on every machine.
"""

import math
from collections.abc import Sequence

import numpy as np


class Draws:
    """A stream of numbers: the 64-bit words of Philox-4x64 with key `seed` at counters (block, purpose, index, 0).

    Words in arrays and single numbers come from the same stream in the order in which they are asked for.

    Args:
        seed, index, purpose: in [0, 2^63); other values give another, independent stream.
    """

    def __init__(self, seed: int, index: int, purpose: int):
        self._bits = np.random.Philox(key=seed, counter=[0, purpose, index, 0])
        self._scalars: list[float] = []

    def words(self, *shape: int) -> np.ndarray:
        """The next words, uint64, as an array of a shape."""
        return self._bits.random_raw(math.prod(shape)).reshape(shape)

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        if not self._scalars:
            self._scalars = unit(self.words(64)).tolist()
        return low + (high - low) * self._scalars.pop()

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return self.between(0.0, 1.0) < probability

    def pick(self, options: Sequence):
        """One of the options, each with the same chance."""
        return options[int(self.between(0.0, len(options)))]


def unit(words: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) with 53 random bits, of the same shape as the words."""
    return (words >> np.uint64(11)) * 2.0**-53


def bell(words: np.ndarray) -> np.ndarray:
    """Numbers of mean 0, variance 1 and |x| < 3.47: the sum of the four 16-bit lanes of a word (no libm)."""
    low, high = words & np.uint64(0x0000FFFF0000FFFF), (words >> np.uint64(16)) & np.uint64(0x0000FFFF0000FFFF)
    pair = low + high
    return ((pair & np.uint64(0xFFFFFFFF)) + (pair >> np.uint64(32))).astype(np.float64) / 37837.0 - 131070 / 37837.0
