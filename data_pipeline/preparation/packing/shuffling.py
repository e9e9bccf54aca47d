"""Places the rows of a set in an order drawn from a number: what readers that only go through shards need."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.hashing import key, permutation
from data_pipeline.preparation.sources.rows import Row

Places = NDArray[np.int32]

_PURPOSE = int.from_bytes(b"shuffle", "big")


def shuffled_places(count: int, seed: int) -> Places:
    """Returns the place of each row: int32 [count], a permutation."""
    return permutation(key(_PURPOSE, seed), count)


def in_places(rows: Iterable[Row], places: Places, rows_per_shard: int) -> Iterator[Row]:
    """Yields rows by their places. Raises UserError for rows that hold their images: memory does not hold them all."""
    held = []
    for row in rows:
        if isinstance(row.image, bytes):
            raise UserError("a table of the images themselves cannot be shuffled; shuffle the table, or use paths")
        held.append(replace(row, place=int(places[row.number]) % rows_per_shard))
    held.sort(key=lambda row: int(places[row.number]))
    yield from held
