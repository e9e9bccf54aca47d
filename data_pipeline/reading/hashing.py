"""Randomness by counting instead of by state: every number is a hash of what it is for, so nothing need be replayed.

The generator is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014). It is written
out here because library generators may change their streams between versions, and the order of a run must not.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_GOLDEN64 = np.uint64(_GOLDEN)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

Integers = NDArray[np.int64]
Bits = NDArray[np.uint64]


def _mix_integer(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix(x: Bits) -> Bits:
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


def key(*parts: int) -> int:
    """One 64-bit key from integers: key(seed, purpose, epoch, ...). Order matters, and so does every part."""
    folded = _GOLDEN
    for part in parts:
        folded = _mix_integer((folded ^ _mix_integer((int(part) + _GOLDEN) & _MASK)) + _GOLDEN & _MASK)
    return folded


def bits(stream: int, count: int) -> Bits:
    """The first `count` 64-bit numbers of a stream: uint64 [count]."""
    return _mix(np.uint64(stream) + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN64)


def permutation(stream: int, count: int) -> NDArray[np.int32]:
    """A permutation of 0 .. count - 1, int32 [count]; memory and time grow with `count` alone."""
    return np.argsort(bits(stream, count), kind="stable").astype(np.int32)


def uniforms(stream: int, positions: Integers, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for each position, whatever other positions are asked: float64 [positions, count]."""
    own = _mix(np.uint64(stream) ^ _mix(positions.astype(np.uint64) + _GOLDEN64))
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN64
    return np.asarray((_mix(own[:, None] + steps[None, :]) >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def uniforms_at(stream: int, position: int, count: int) -> list[float]:
    """`uniforms` of one position: without arrays, which take longer than so few numbers."""
    own = _mix_integer((stream ^ _mix_integer((position + _GOLDEN) & _MASK)) & _MASK)
    return [(_mix_integer((own + n * _GOLDEN) & _MASK) >> 11) * 2.0**-53 for n in range(1, count + 1)]


def integer_below(bound: int, *parts: int) -> int:
    """One integer in [0, bound) from what it is for."""
    return key(*parts) % bound


def as_integers(values: Any) -> Integers:
    return np.asarray(values, dtype=np.int64)
