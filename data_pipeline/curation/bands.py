"""Which bits of a 256-bit hash near duplicates are looked up by, and how many of them that finds.

Two hashes within the distance are found where they agree in all bits of at least one band. A band is one block of 16
bits, or two blocks in sets so large that 16 bits would put too many strangers together. Bands of one block find every
pair of distance 15 or less.
"""

from itertools import combinations

import numpy as np

BLOCKS, BLOCK_BITS = 16, 16
_ONE_BLOCK_ROWS = 2_000_000  # above it, a 16-bit band holds 30 strangers a row
_TWO_BLOCK_BANDS = 48
_TRIALS = 20_000
Band = tuple[int, ...]  # numbers of blocks


def choose_bands(rows: int, count: int | None = None) -> list[Band]:
    """Chooses the bands for a set of so many rows; `count` of them, where given."""
    if rows <= _ONE_BLOCK_ROWS:
        single: list[Band] = [(block,) for block in range(BLOCKS)]
        return single[:count]
    # Pairs by rising distance around a circle of blocks, so that every block is used as often as any other.
    pairs = sorted(combinations(range(BLOCKS), 2), key=lambda pair: min(pair[1] - pair[0], BLOCKS - pair[1] + pair[0]))
    return [tuple(pair) for pair in pairs][: count or _TWO_BLOCK_BANDS]


def expected_recall(bands: list[Band], distance: int) -> float:
    """Estimates the share of pairs at exactly this distance that agree in a band, if differing bits lie anywhere.

    20,000 random placements: 0.35 points of standard error at most.
    """
    if distance == 0:
        return 1.0
    rng = np.random.default_rng(distance)
    bits = np.argsort(rng.random((_TRIALS, BLOCKS * BLOCK_BITS)), axis=1)[:, :distance]
    touched = np.zeros((_TRIALS, BLOCKS), dtype=bool)
    np.put_along_axis(touched, bits // BLOCK_BITS, True, axis=1)
    found = np.zeros(_TRIALS, dtype=bool)
    for band in bands:
        found |= ~touched[:, list(band)].any(axis=1)
    return float(found.mean())
