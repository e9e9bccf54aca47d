"""Fills a batch's arrays: reads samples, draws views, writes targets, replaces bad samples. Runs in workers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from data_pipeline.errors import BadDataError
from data_pipeline.hashing import Integers, key, uniforms
from data_pipeline.reading.batch import SampleRef
from data_pipeline.reading.config import DataConfig, RectangleConfig
from data_pipeline.reading.decode.augmentation import augment, leave_out_parts, turned
from data_pipeline.reading.decode.pixels import BadSample, DroppedSample, Header, Pixels
from data_pipeline.reading.decode.rectangle import Placed, draw_rectangle, render_rectangle
from data_pipeline.reading.decode.views import UNIFORMS, Crop, random_crop, render_views
from data_pipeline.reading.faults import Fault
from data_pipeline.reading.order.samples import Order
from data_pipeline.reading.storage.shards import RawSample, ShardSet
from data_pipeline.reading.targets import Targets, TargetSource, TargetSpec
from data_pipeline.reading.workers.memory import Arrays, Layout

_AUGMENT = 5  # purpose of hash keys
_NEAR, _FAR = 8, 24  # bad replacements passed over in the same block, then in the whole source
_DROPPED_NEAR, _DROPPED_FAR = 256, 1024  # dropped ones, which cost no reading


@dataclass
class Filled:
    """The rest of a batch, besides its arrays: each row's sample and its targets' extra, and the faults."""

    samples: list[SampleRef]
    extras: list[object]
    faults: list[Fault] = field(default_factory=list)

    @classmethod
    def empty(cls, rows: int) -> "Filled":
        return cls([SampleRef("", "", "")] * rows, [None] * rows)


class RowCandidate(Protocol):
    """A sample that may fill a row. `ref` costs a look into the shard's index."""

    def read(self) -> RawSample:
        """Raises BadSample."""

    def ref(self) -> SampleRef: ...


class RowFiller:
    """Fills single rows: the views of a training sample, drawn for its position, and its targets."""

    def __init__(
        self, config: DataConfig, targets: TargetSpec[Targets], sources: Sequence[TargetSource], seed: int
    ) -> None:
        self._config, self._targets, self._sources = config, targets, sources
        self._stream = key(seed, _AUGMENT)  # of all randomness in views

    def layout(self, rows: int) -> Layout:
        """Returns the arrays of a batch."""
        views, size = self._config.views, self._config.image_size
        own: Layout = {"views": ((rows, views, size, size, 3), np.uint8), "crops": ((rows, views, 6), np.float32)}
        if self._config.rectangle is not None:
            own["sizes"] = ((rows, 2), np.int32)  # height and width of each view in its canvas
        return own | self._targets.layout(rows)

    def chances(self, positions: Integers) -> np.ndarray:
        """Returns the hashed numbers of every position's crops, float64 [positions, UNIFORMS V]."""
        return uniforms(self._stream, positions, UNIFORMS * self._config.views)

    def fill(
        self,
        row: int,
        position: int,
        source: int,
        chances: list[float],
        candidates: Iterator[RowCandidate],
        failed: list[tuple[RowCandidate, BadSample]],
        arrays: Arrays,
        filled: Filled,
    ) -> None:
        """Writes the first usable one of `candidates`. The others go to `failed`, by which `candidates` may decide to
        give up."""
        for candidate in candidates:
            try:
                sample = candidate.read()
                self._draw(sample.image, position, chances, row, arrays)
                if sample.caption and self._config.augmentation.caption_dropout:
                    left = leave_out_parts(
                        sample.caption, self._config.augmentation.caption_dropout, self._stream, position
                    )
                    sample = sample._replace(caption=left)
                extra = self._targets.write(row, sample, self._sources[source], arrays["crops"][row], arrays)
                break
            except DroppedSample:
                continue
            except BadSample as error:
                failed.append((candidate, error))
        used = candidate.ref()
        filled.samples[row], filled.extras[row] = used, extra
        for bad, fault in failed:
            filled.faults.append(Fault(position, *bad.ref(), fault.reason, fault.detail, (used.shard, used.key)))
        if reason := self._targets.incomplete(sample, self._sources[source]):
            filled.faults.append(Fault(position, *used, reason, "", None))

    def finish(self, arrays: Arrays, filled: Filled) -> None:
        self._targets.finish(filled.extras, arrays)
        filled.faults.sort(key=lambda fault: fault.position)

    def _draw(self, data: bytes, position: int, chances: list[float], row: int, arrays: Arrays) -> None:
        """Writes the views of an image, uint8 [V, S, S, 3], and their crops, float32 [V, 6]. Raises BadSample."""
        rules, views, crops = self._config.augmentation, arrays["views"][row], arrays["crops"][row]
        if self._config.rectangle is not None:
            self._draw_rectangle(self._config.rectangle, data, position, chances, row, arrays)
            return
        own = [chances[view * UNIFORMS : (view + 1) * UNIFORMS] for view in range(len(views))]

        def choose(header: Header) -> list[Crop]:
            size = header.width, header.height
            return [random_crop(*size, numbers, rules.scale, rules.ratio, rules.flip) for numbers in own]

        def change(picture: Pixels) -> Pixels:
            return turned(picture, rules, self._stream, position)

        render_views(data, self._config.max_pixels, choose, change, views, crops)
        for number, view in enumerate(views):
            augment(view, rules, self._stream, position, number)

    def _draw_rectangle(
        self, shape: RectangleConfig, data: bytes, position: int, chances: list[float], row: int, arrays: Arrays
    ) -> None:
        """Writes the one view of a dense task into the corner of its canvas, zeros around it, and its size."""
        rules, canvas = self._config.augmentation, arrays["views"][row, 0]

        def place(header: Header) -> Placed:
            return draw_rectangle(header.width, header.height, chances, shape, len(canvas), rules.flip)

        view, placed = render_rectangle(data, self._config.max_pixels, place)
        augment(view, rules, self._stream, position, 0)
        canvas[:] = 0
        canvas[: placed.height, : placed.width] = view
        arrays["crops"][row, 0] = placed.crop
        arrays["sizes"][row] = placed.height, placed.width


@dataclass(frozen=True)
class _Indexed:
    """A row of a shard that can seek."""

    source: str
    set: ShardSet
    shard: int
    row: int

    def read(self) -> RawSample:
        return self.set.shard(self.shard).read(self.row)

    def ref(self) -> SampleRef:
        name = self.set.manifest.shards[self.shard].name
        return SampleRef(self.source, name, self.set.shard(self.shard).key(self.row), self.row)


class BatchBuilder:
    """Fills batches. A pure function of the positions asked for (and of the shards)."""

    def __init__(self, filler: RowFiller, order: Order, names: Sequence[str], sets: Sequence[ShardSet]) -> None:
        self._filler, self._order, self._names, self._sets = filler, order, names, sets

    def fill(self, positions: Integers, arrays: Arrays) -> Filled:
        """Writes the samples at `positions`, int64 [B], into `arrays`."""
        sources, indices = self._order.indices(positions)
        located = self._order.locate(positions)
        chances = self._filler.chances(positions)
        filled = Filled.empty(len(positions))
        for i in np.lexsort((located.row, located.shard, sources)).tolist():  # shard by shard, in file order
            source, failed = int(sources[i]), list[tuple[RowCandidate, BadSample]]()
            candidates = self._candidates(source, int(indices[i]), int(located.shard[i]), int(located.row[i]), failed)
            self._filler.fill(i, int(positions[i]), source, chances[i].tolist(), candidates, failed, arrays, filled)
        self._filler.finish(arrays, filled)
        return filled

    def _candidates(
        self, source: int, index: int, shard: int, row: int, failed: list[tuple[RowCandidate, BadSample]]
    ) -> Iterator[_Indexed]:
        """Yields the sample of the place, then its replacements, near ones first: a function of the place alone."""
        order, name, shards = self._order.sources[source], self._names[source], self._sets[source]
        yield _Indexed(name, shards, shard, row)
        for choose, bad, dropped in (
            (order.neighbour, _NEAR, _DROPPED_NEAR),
            (order.anywhere, _FAR, _DROPPED_FAR),
        ):
            most = len(failed) + bad
            for number in range(bad + dropped):
                _, found, rows = order.locate(np.array([choose(index, number)]))
                yield _Indexed(name, shards, int(found[0]), int(rows[0]))
                if len(failed) >= most:
                    break
        if not failed:
            raise BadDataError(
                f"source {name}: {_DROPPED_NEAR + _DROPPED_FAR} samples in a row were dropped by curation. "
                "Write those that are left into a set of their own: `internimage shards reshard`"
            )
        reasons = "; ".join(sorted({f"{candidate.ref().shard}: {fault}" for candidate, fault in failed})[:4])
        raise BadDataError(
            f"source {name}: {len(failed)} samples in a row cannot be used, among them {reasons}. "
            "Check the shards with `internimage shards verify`"
        )
