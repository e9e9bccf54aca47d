"""Random numbers without state: every number is a hash of its purpose, so that no earlier draw need be replayed.

The generator is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014). It is written
out here because library generators may change their streams between versions, and the order of a run must not.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

_MASK = (1 << 64) - 1
GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_GOLDEN64, _FIRST64, _SECOND64 = np.uint64(GOLDEN), np.uint64(_FIRST), np.uint64(_SECOND)

Integers = NDArray[np.int64]
Bits = NDArray[np.uint64]


def _mix_integer(x: int) -> int:
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def _mix(x: Bits) -> Bits:
    x = (x ^ (x >> np.uint64(30))) * _FIRST64
    x = (x ^ (x >> np.uint64(27))) * _SECOND64
    return x ^ (x >> np.uint64(31))


def key(*parts: int) -> int:
    """Hashes integers to one 64-bit key: key(seed, purpose, epoch, ...). Order matters, and so does every part."""
    folded = GOLDEN
    for part in parts:
        folded = _mix_integer((folded ^ _mix_integer((int(part) + GOLDEN) & _MASK)) + GOLDEN & _MASK)
    return folded


def bits(stream: int, count: int) -> Bits:
    """Returns the first `count` 64-bit numbers of a stream: uint64 [count]."""
    return _mix(np.uint64(stream) + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN64)


def permutation(stream: int, count: int) -> NDArray[np.int32]:
    """Permutes 0 .. count - 1: int32 [count]; memory and time grow with `count` alone."""
    return np.argsort(bits(stream, count), kind="stable").astype(np.int32)


def uniforms(stream: int, positions: Integers, count: int) -> NDArray[np.float64]:
    """Hashes each position, whatever the others, to `count` numbers in [0, 1): float64 [positions, count]."""
    own = _mix(np.uint64(stream) ^ _mix(positions.astype(np.uint64) + _GOLDEN64))
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN64
    return np.asarray((_mix(own[:, None] + steps[None, :]) >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def uniforms_at(stream: int, position: int, count: int) -> list[float]:
    """Does what `uniforms` does, for one position, without arrays, which take longer for so few numbers."""
    own = _mix_integer((stream ^ _mix_integer((position + GOLDEN) & _MASK)) & _MASK)
    return [(_mix_integer((own + n * GOLDEN) & _MASK) >> 11) * 2.0**-53 for n in range(1, count + 1)]


def signed(value: int) -> int:
    """Returns the int64 that has the bits of `value` modulo 2^64."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mix_tensor(z: "Tensor") -> "Tensor":
    """Applies SplitMix64's finalizer to int64 values; arithmetic wraps around, so every device gives equal bits."""
    z = (z ^ shift_right(z, 30)) * signed(_FIRST)
    z = (z ^ shift_right(z, 27)) * signed(_SECOND)
    return z ^ shift_right(z, 31)


def shift_right(z: "Tensor", bits: int) -> "Tensor":
    """Shifts int64 values logically; torch's own shift keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
