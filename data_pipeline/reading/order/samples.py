"""Decides which sample stands at which position: a pure function, so that the state of a run is one number.

    epoch e of a source     shards permuted by hash(seed, source, e)
    block                   `block_shards` neighbours in that order, its samples permuted by hash(seed, source, e, b)

        permuted shards:  | 7 | 2 | 9 | 4 || 1 | 8 | 0 | 3 || 5 | 6 |        block_shards = 4
        samples:          |  any order    ||  any order    || ...   |

Seeking costs one permutation of the shards and one of a block, never one of the whole source: 427 million samples in
42,700 shards need 43 thousand and 160 thousand numbers.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.hashing import Integers, key, permutation
from data_pipeline.reading.order.course import Course, Segment

_SHARDS, _BLOCK, _NEAR, _FAR = 1, 2, 3, 4  # purposes of hash keys
_T = TypeVar("_T")


class Located(NamedTuple):
    """Where samples lie, int64 [n] each: source, its epoch, shard (number in the manifest), row in the shard."""

    source: Integers
    epoch: Integers
    shard: Integers
    row: Integers


@dataclass(frozen=True)
class _Epoch:
    shards: NDArray[np.int32]  # shard numbers in reading order
    starts: Integers  # place of each shard's first sample, in reading order; one more at the end
    block_starts: Integers


class _Recent:
    """Keeps the last few results of an expensive pure function."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._items: OrderedDict[tuple[int, ...], object] = OrderedDict()

    def get(self, name: tuple[int, ...], make: Callable[[], _T]) -> _T:
        if name in self._items:
            self._items.move_to_end(name)
        else:
            self._items[name] = make()
            if len(self._items) > self._keep:
                self._items.popitem(last=False)
        return self._items[name]  # type: ignore[return-value]


class SourceOrder:
    """Order of one source: `sizes` are its shards' sample counts, int [shards]."""

    def __init__(self, sizes: Sequence[int] | Integers, *, block_shards: int, seed: int, source: int = 0) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        self.block_shards = block_shards
        self._stream = (seed, source)
        self._epochs, self._blocks = _Recent(2), _Recent(3)
        if self.samples <= 0:
            raise ValueError("a source without samples has no order")

    def locate(self, indices: Integers) -> tuple[Integers, Integers, Integers]:
        """Maps running indices into the source (epoch after epoch), int64 [n], to epoch, shard, row, int64 [n] each."""
        epochs, offsets = np.divmod(np.asarray(indices, dtype=np.int64), self.samples)
        shards, rows = np.empty_like(offsets), np.empty_like(offsets)
        for epoch in np.unique(epochs):
            layout = self._epoch(int(epoch))
            mine = np.flatnonzero(epochs == epoch)
            blocks = np.searchsorted(layout.block_starts, offsets[mine], side="right") - 1
            for block in np.unique(blocks):
                chosen = mine[blocks == block]
                start = layout.block_starts[block]
                places = start + self._block(int(epoch), int(block))[offsets[chosen] - start]
                slots = np.searchsorted(layout.starts, places, side="right") - 1
                shards[chosen] = layout.shards[slots]
                rows[chosen] = places - layout.starts[slots]
        return epochs, shards, rows

    def neighbour(self, index: int, number: int) -> int:
        """Picks a running index by hash from the block that holds `index`: the `number`-th choice."""
        epoch, offset = divmod(index, self.samples)
        layout = self._epoch(epoch)
        block = int(np.searchsorted(layout.block_starts, offset, side="right")) - 1
        start, end = int(layout.block_starts[block]), self._block_end(layout, block)
        return epoch * self.samples + start + key(*self._stream, _NEAR, index, number) % (end - start)

    def anywhere(self, index: int, number: int) -> int:
        """Picks a running index by hash from the whole source, in the same epoch: the `number`-th choice."""
        return index // self.samples * self.samples + key(*self._stream, _FAR, index, number) % self.samples

    def coming_shards(self, index: int, count: int) -> list[int]:
        """Lists the shards of the block that holds running index `index`, then the next ones: `count` at most."""
        found: list[int] = []
        epoch, offset = divmod(index, self.samples)
        while len(found) < count:
            layout = self._epoch(epoch)
            block = int(np.searchsorted(layout.block_starts, offset, side="right")) - 1
            rest = layout.shards[block * self.block_shards :]
            found += [int(shard) for shard in rest[: count - len(found)]]
            epoch, offset = epoch + 1, 0
            if len(found) >= len(self.sizes):
                break
        return list(dict.fromkeys(found))

    def _block_end(self, layout: _Epoch, block: int) -> int:
        last = block + 1 == len(layout.block_starts)
        return self.samples if last else int(layout.block_starts[block + 1])

    def _epoch(self, epoch: int) -> _Epoch:
        def make() -> _Epoch:
            shards = permutation(key(*self._stream, _SHARDS, epoch), len(self.sizes))
            starts = np.concatenate([[0], np.cumsum(self.sizes[shards])])
            return _Epoch(shards, starts, starts[:-1][:: self.block_shards])

        return self._epochs.get((epoch,), make)

    def _block(self, epoch: int, block: int) -> NDArray[np.int32]:
        def make() -> NDArray[np.int32]:
            layout = self._epoch(epoch)
            length = self._block_end(layout, block) - int(layout.block_starts[block])
            return permutation(key(*self._stream, _BLOCK, epoch, block), length)

        return self._blocks.get((epoch, block), make)


class Order:
    """Order of a whole mixture: global position -> source, epoch, shard, row.

    segments: of a run that changes its mixture on the way; without them `weights` hold throughout.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int] | Integers],
        weights: Sequence[float],
        *,
        block_shards: int,
        seed: int,
        segments: Sequence[Segment] = (),
    ) -> None:
        self.course = Course(segments or [Segment(0, 1, tuple(weights))], seed=seed)
        self.sources = [
            SourceOrder(own, block_shards=block_shards, seed=seed, source=number) for number, own in enumerate(sizes)
        ]

    @property
    def epoch_samples(self) -> int:
        """Counts the samples of all sources together."""
        return sum(source.samples for source in self.sources)

    def indices(self, positions: Integers) -> tuple[Integers, Integers]:
        """Maps global positions to source and running index in that source; int64 [n] each."""
        return self.course.locate(np.asarray(positions, dtype=np.int64))

    def locate(self, positions: Integers) -> Located:
        """Maps global positions, int64 [n], to the samples that stand there."""
        source, index = self.indices(positions)
        epoch, shard, row = np.empty_like(source), np.empty_like(source), np.empty_like(source)
        for number in np.unique(source):
            mine = source == number
            epoch[mine], shard[mine], row[mine] = self.sources[number].locate(index[mine])
        return Located(source, epoch, shard, row)
