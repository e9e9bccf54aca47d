"""The training loop's only source of data: batches that are a pure function of (sets, configuration, seed, step)."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Self

import numpy as np
import torch

from data_pipeline.callbacks import EventSink, Heartbeat
from data_pipeline.errors import UserError
from data_pipeline.hashing import Integers
from data_pipeline.reading.batch import Batch, SampleRef
from data_pipeline.reading.config import DataConfig
from data_pipeline.reading.decode.views import one_thread
from data_pipeline.reading.events import INEXACT_ORDER
from data_pipeline.reading.faults import Fault, FaultLog
from data_pipeline.reading.lineage import describe_sample, describe_samples
from data_pipeline.reading.order.course import Segment
from data_pipeline.reading.order.samples import Order, SourceOrder
from data_pipeline.reading.order.share import Share
from data_pipeline.reading.storage.remote import RemoteFiles, ShardPrefetcher, cache_shares
from data_pipeline.reading.storage.shards import ShardSet
from data_pipeline.reading.storage.sources import SourceRecord, merge_classes, open_sources, record_sources
from data_pipeline.reading.streaming import INEXACT, Streams, check_streams
from data_pipeline.reading.targets import T, TargetSource, TargetSpec
from data_pipeline.reading.workers.builder import BatchBuilder, Filled, RowFiller
from data_pipeline.reading.workers.memory import Arrays, allocate
from data_pipeline.reading.workers.pinning import pinned_prefetcher
from data_pipeline.reading.workers.pool import WorkerPool


class Reader(Generic[T]):
    """One rank's batches, with the targets of its task.

    Step s is global positions [s B, (s + 1) B); micro-batch a of it is the a-th run of B / accumulation, and a rank's
    share the rank-th run of that. Resuming is `batches(start_step)`: there is no other state but the segments of a run
    that has changed B or the weights on its way (order/course.py).

    `targets`: makes each sample's targets. `events` gets a dictionary for each sample that was bad or incomplete, when
    its batch is consumed. Sets without an index are indexed once a node, into `config.cache.folder`; meanwhile
    `heartbeat` is called.

    Raises UserError where sets are missing or the batch does not divide; BadDataError from `batches` above
    `config.max_bad_rate`. Ranks that meet in collectives must end together: without `enforce_bad_rate` the caller
    raises, from `faults.seen` and `faults.bad` of all ranks.
    """

    def __init__(
        self,
        config: DataConfig,
        targets: TargetSpec[T],
        *,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        events: EventSink | None = None,
        enforce_bad_rate: bool = True,
        heartbeat: Heartbeat | None = None,
        segments: Sequence[Segment] = (),
    ) -> None:
        self.config = config
        self.share = Share(batch_size, accumulation, rank, world_size)
        self._targets, self._seed, self._enforce_bad_rate = targets, seed, enforce_bad_rate
        self._sets: list[ShardSet] = []
        streamed = check_streams(config)
        if streamed:
            self.names = [source.name or f"stream-{number}" for number, source in enumerate(config.sources)]
            if events is not None and rank == 0:
                events({"kind": INEXACT_ORDER, "detail": INEXACT})
        else:
            told = events if rank == 0 else None
            self.names, self._sets = open_sources(config, told, heartbeat, targets.members)
        named = [one.manifest.classes for one in self._sets] or [None] * len(config.sources)
        self.classes, numbers = merge_classes(
            [classes if source.labels else None for classes, source in zip(named, config.sources, strict=True)]
        )
        sources = [
            TargetSource(source.captions, own is not None, own)
            for source, own in zip(config.sources, numbers, strict=True)
        ]
        sizes = [[shard.samples for shard in s.manifest.shards] for s in self._sets]
        sizes = sizes or [[source.samples or 0] for source in config.sources]
        self._sizes = sizes
        self.order = self._order(segments)
        remote = {n: one.files for n, one in enumerate(self._sets) if isinstance(one.files, RemoteFiles)}
        self._remote = dict(
            zip(remote, cache_shares(list(remote.values()), config.cache, config.block_shards), strict=True)
        )
        self.faults = FaultLog(config.max_bad_rate, events, repeats=not streamed)
        self._filler = RowFiller(config, targets, sources, seed)
        self._builder = BatchBuilder(self._filler, self.order, self.names, self._sets)
        self._streams = Streams(config, self._filler, self.names, rank, world_size, seed) if streamed else None
        self._pool: WorkerPool | None = None

    def _order(self, segments: Sequence[Segment]) -> Order:
        weights = tuple(source.weight for source in self.config.sources)
        segments = segments or (Segment(0, self.share.batch_size, weights),)
        return Order(self._sizes, weights, block_shards=self.config.block_shards, seed=self._seed, segments=segments)

    @property
    def epoch_samples(self) -> int:
        """Samples of all sources together: the length of an epoch of the run."""
        return self.order.epoch_samples

    @property
    def num_classes(self) -> int:
        return len(self.classes or ())

    @property
    def sources(self) -> tuple[SourceRecord, ...]:
        """What stays known of each source where its set is gone."""
        return record_sources(self.config, self.names, self._sets)

    def has_labels(self) -> bool:
        """Whether a sample of the sources whose labels are used has one; true of streams, which cannot tell."""
        used = [one for source, one in zip(self.config.sources, self._sets, strict=bool(self._sets)) if source.labels]
        return self._streams is not None or any(one.has_labels() for one in used)

    @property
    def fingerprint(self) -> str:
        """Hashes what the order depends on beside a run's segments (batch sizes and weights): with equal ones, equal
        fingerprints give equal batches, but for samples that curation has dropped or erased meanwhile, whose places
        others take."""
        shards = [[(s.name, s.samples, s.slots) for s in one.manifest.shards] for one in self._sets]
        parts = [shards, self.config.block_shards, self._seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def batches(self, start_step: int = 0, segments: Sequence[Segment] = ()) -> Iterator[Batch[T]]:
        """Yields batches from `start_step` on, without end: step by step, micro-batch by micro-batch.

        segments: of the run, the last of which is that of `start_step`; without them it has one.
        """
        if self._pool is not None:
            self._pool.close()
        self.order = self._order(segments)
        self._builder = BatchBuilder(self._filler, self.order, self.names, self._sets)
        pool = self._pool = self._start_workers()  # before this process starts threads, which a fork would cut off
        tasks = self._tasks(start_step)
        if self._streams is not None:
            filled = self._streams.run(start_step, tasks)
        elif pool is not None:
            filled = pool.run(tasks)
        else:
            filled = ((name, positions, *self._fill_here(positions)) for name, positions in tasks)
        ahead = self._fetch_ahead(start_step)
        made = self._made(filled)
        pinning = pinned_prefetcher(made, _pin) if torch.cuda.is_available() and pool is not None else None
        try:
            for batch, faults in pinning or made:
                for source, fetching in ahead.items():
                    fetching.advance(self._consumed(batch.step + 1)[source])
                self.faults.add(batch.step, batch.positions.numpy(), faults)
                if self._enforce_bad_rate:
                    self.faults.check()
                yield batch.pin() if torch.cuda.is_available() and pinning is None else batch
                del batch
        finally:
            if pinning is not None:
                pinning.close()
            if pool is not None:
                pool.close()
            for fetching in ahead.values():
                fetching.close()

    def _made(
        self, built: Iterator[tuple[tuple[int, int], Integers, Arrays, Filled]]
    ) -> Iterator[tuple[Batch[T], list[Fault]]]:
        for (step, micro), positions, arrays, filled in built:
            batch = self._batch(step, micro, positions, arrays, filled)
            del arrays  # the batch alone may keep the slot of the worker pool
            yield batch, filled.faults
            del batch

    def progress(self, step: int) -> dict[str, dict[str, float]]:
        """Returns what each source has given before `step`: samples and epochs."""
        given = zip(self.names, self._consumed(step), self.order.sources, strict=True)
        return {name: {"samples": count, "epochs": count / source.samples} for name, count, source in given}

    def at(self, positions: Integers) -> Batch[T]:
        """Builds a batch of any global positions, int64 [n], as training sees them. Faults are not counted."""
        self._refuse_streams()
        arrays, filled = self._fill_here(positions)
        return self._batch(self.order.course.step(int(positions[0])), 0, positions, arrays, filled)

    def records(self, step: int) -> list[dict[str, Any]]:
        """Looks up each sample of the global batch of `step` in its sidecar: position, source, its epoch, shard, row,
        key, url, caption, label (its name, where the set has names)."""
        self._refuse_streams()
        positions = self.positions(step)
        return describe_samples(self.order.locate(positions), positions, self.names, self._sets)

    def positions(self, step: int) -> Integers:
        """The global positions of a step, int64 [batch size]."""
        first = self.order.course.first(step)
        return np.arange(first, first + self.order.course.batch_size(step), dtype=np.int64)

    def record(self, source: str, shard: str, key: str) -> dict[str, Any]:
        """Looks up one sample in its sidecar, for instance a replacement that the run's events name."""
        return describe_sample(self._sets[self.names.index(source)], shard, key)

    def lineage(self, step: int) -> list[SampleRef]:
        """Names the samples of the global batch of `step`, by position, before replacements."""
        return [SampleRef(*(said[name] for name in SampleRef._fields)) for said in self.records(step)]

    def close(self) -> None:
        """Ends the workers and closes the shards."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        for one in self._sets:
            one.close()

    def _start_workers(self) -> WorkerPool | None:
        workers, prefetch, method = self.config.workers, self.config.prefetch, self.config.start_method
        if workers == 0 or self._streams is not None:  # streams are read in the training process
            return None
        layout = self._filler.layout(self.share.rows)
        return WorkerPool(self._builder, layout, workers=workers, prefetch=prefetch, start_method=method)

    def _fill_here(self, positions: Integers) -> tuple[Arrays, Filled]:
        arrays = allocate(self._filler.layout(len(positions)))
        with one_thread():
            return arrays, self._builder.fill(positions, arrays)

    def _consumed(self, step: int) -> list[int]:
        """Counts the samples that each source has given before `step`."""
        return self.order.course.consumed(self.order.course.first(step))

    def _fetch_ahead(self, step: int) -> dict[int, ShardPrefetcher]:
        """Starts the threads that fetch ahead, by remote source."""
        consumed = self._consumed(step)
        ahead = {}
        for number, budget in self._remote.items():
            files, sizes = self._sets[number].files, self.order.sources[number].sizes
            assert isinstance(files, RemoteFiles)
            order = SourceOrder(sizes, block_shards=self.config.block_shards, seed=self._seed, source=number)
            ahead[number] = ShardPrefetcher(files, order, consumed[number], budget)
        return ahead

    def _tasks(self, step: int) -> Iterator[tuple[tuple[int, int], Integers]]:
        shift = self.order.course.first(step) - step * self.share.batch_size  # 0 in a run of one segment
        while True:
            for micro in range(self.share.accumulation):
                yield (step, micro), self.share.positions(step, micro) + shift
            step += 1

    def _batch(self, step: int, micro: int, positions: Integers, arrays: Arrays, filled: Filled) -> Batch[T]:
        views, crops = (torch.from_numpy(arrays[name]) for name in ("views", "crops"))
        targets = self._targets.collate(arrays, filled.extras)
        return Batch(step, micro, torch.from_numpy(positions), views, crops, targets, tuple(filled.samples))

    def _refuse_streams(self) -> None:
        if self._streams is not None:
            raise UserError(f"the samples of a step cannot be told: {INEXACT}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pin(made: tuple[Batch[T], list[Fault]]) -> tuple[Batch[T], list[Fault]]:
    return made[0].pin(), made[1]
