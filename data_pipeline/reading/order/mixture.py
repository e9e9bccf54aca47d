"""Decides which source stands at which position: weights are whole numbers in a fixed period, shuffled each period.

    weights 3 : 1  ->  period of 1024 positions, 768 of source 0 and 256 of source 1, in a new order each period

The samples that a source has given before a position are therefore known exactly, and so are its epochs.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray

from data_pipeline.hashing import Integers, key, permutation

_PURPOSE = 3
_SHORTEST, _LONGEST = 1024, 65536


def period_counts(weights: Sequence[float]) -> list[int]:
    """Returns each source's positions in one period. Exact for weights in whole ratios that sum to 65,536 at most; else
    rounded to 1/65,536 by largest remainder, with at least one position a source.

    Raises ValueError for weights that are not positive and for over 65,536 sources.
    """
    if not weights or len(weights) > _LONGEST or not all(0 < w < float("inf") for w in weights):
        raise ValueError(f"mixture weights must be positive numbers, found {list(weights)}")
    exact = [Fraction(w).limit_denominator(10**6) or Fraction(w) for w in weights]
    scale = lcm(*(w.denominator for w in exact))
    whole = [int(w * scale) for w in exact]
    common = gcd(*whole)
    whole = [n // common for n in whole]
    total = sum(whole)
    if total <= _LONGEST:
        times = -(-_SHORTEST // total)
        return [n * times for n in whole]
    shares = [n * _LONGEST / total for n in whole]
    counts = [max(1, int(share)) for share in shares]
    while sum(counts) != _LONGEST:
        step = 1 if sum(counts) < _LONGEST else -1
        candidates = [i for i in range(len(counts)) if counts[i] + step >= 1]
        chosen = max(candidates, key=lambda i: step * (shares[i] - counts[i]))
        counts[chosen] += step
    return counts


class Mixture:
    """Picks sources by weight, a pure function of (seed, position)."""

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self.counts = np.array(period_counts(weights), dtype=np.int64)
        self.period = int(self.counts.sum())
        self._seed = seed
        self._recent: dict[int, tuple[NDArray[np.int32], NDArray[np.int32]]] = {}

    def locate(self, positions: Integers) -> tuple[Integers, Integers]:
        """Maps global positions, int64 [n], to source and running index in that source, int64 [n] each."""
        if len(self.counts) == 1:
            return np.zeros_like(positions), positions.copy()
        periods, slots = np.divmod(positions, self.period)
        sources, indices = np.empty_like(positions), np.empty_like(positions)
        for period in np.unique(periods):
            mine = periods == period
            source, rank = self._period(int(period))
            sources[mine] = source[slots[mine]]
            indices[mine] = period * self.counts[sources[mine]] + rank[slots[mine]]
        return sources, indices

    def consumed(self, position: int) -> list[int]:
        """Counts the samples that each source gives to the positions before `position`."""
        if len(self.counts) == 1:
            return [position]
        period, slot = divmod(position, self.period)
        inside = np.bincount(self._period(period)[0][:slot], minlength=len(self.counts))
        return [int(n) for n in period * self.counts + inside]

    def _period(self, period: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns each slot's source, and how many earlier slots of the period have the same source."""
        if period not in self._recent:
            shuffled = permutation(key(self._seed, _PURPOSE, period), self.period)
            source = np.searchsorted(np.cumsum(self.counts), shuffled, side="right").astype(np.int32)
            rank = np.empty_like(source)
            for number in range(len(self.counts)):
                mine = np.flatnonzero(source == number)
                rank[mine] = np.arange(len(mine))
            if len(self._recent) >= 2:
                self._recent.pop(next(iter(self._recent)))
            self._recent[period] = (source, rank)
        return self._recent[period]
