"""Stages the shards of a packing run, for their owner to commit one after the other.

    many shards        each process makes whole ones, so that no image passes between processes
    few, or tables     processes prepare rows, and the owner writes the shard
    that hold images

A shard that is only staged does not exist yet: what a process does whose owner was killed makes no difference.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from data_pipeline.format import ShardEntry
from data_pipeline.preparation.packing.away import Away
from data_pipeline.preparation.packing.retries import merged, unchanged
from data_pipeline.preparation.packing.rows import Captionless, pack_row, sample_of
from data_pipeline.preparation.packing.rules import ImageRules
from data_pipeline.preparation.packing.samples import Sample, stage_shard
from data_pipeline.preparation.packing.workers import surviving_map
from data_pipeline.preparation.sources.rows import Row

DECODER_DIED = "decoder_died"  # the image killed the process that decoded it
_SHARDS_A_WORKER = 2  # with fewer, some processes would have nothing to do at the end


@dataclass(frozen=True)
class Shards:
    """What all shards of a run share."""

    output: Path
    rules: ImageRules
    captionless: Captionless
    rows_per_shard: int
    classes: tuple[str, ...] | None
    further: pa.Schema
    away: Away | None = None

    def sample(self, row: Row) -> Sample:
        return pack_row(row, self.rules, self.captionless)

    def stage(self, due: "Due", samples: Iterable[Sample]) -> ShardEntry | None:
        """Stages a shard from the samples of its due rows; None where rows made anew have the former reasons."""
        if due.former is not None:
            fresh = {sample.row: sample for sample in samples}
            if unchanged(due.again, fresh):
                return None
            if self.away is not None:
                self.away.bring_back(self.output, due.former)
            samples = merged(self.output, due.former, fresh)
        first = due.number * self.rows_per_shard
        return stage_shard(self.output, due.number, first, samples, classes=self.classes, further=self.further)


@dataclass(frozen=True)
class Due:
    """A shard that has to be made. former: its entry where it is finished; then only rows are made anew that had the
    reasons `again`, by row."""

    number: int
    former: ShardEntry | None = None
    again: Mapping[int, str] = field(default_factory=dict)


def staged_shards(
    shards: Shards,
    due: Mapping[int, Due],
    rows: Iterator[Row],
    shard_of: Callable[[int], int],
    workers: int,
    step: Callable[[int], None],
) -> Iterator[tuple[int, ShardEntry | None]]:
    """Yields number and entry of every due shard once it is staged, in order; no entry where it stays as it is.

    rows: those that are due, shard by shard, at least one. step: told how many rows are done. An image that kills the
    process that decodes it is rejected, unless there is only one worker.
    """
    first = next(rows)
    rows = itertools.chain([first], rows)
    if workers > 1 and len(due) >= _SHARDS_A_WORKER * workers and not isinstance(first.image, bytes):
        groups = itertools.groupby(rows, lambda row: shard_of(row.number))
        jobs = ((due[number], tuple(group)) for number, group in groups)
        made = surviving_map(partial(_make, shards), jobs, workers, partial(_make_carefully, shards), chunk_size=1)
        for one, count, entry in made:
            step(count)
            yield one, entry
        return
    samples = _told(surviving_map(shards.sample, rows, workers, given_up), step)
    for number, group in itertools.groupby(samples, lambda sample: shard_of(sample.row)):
        yield number, shards.stage(due[number], group)


def given_up(row: Row) -> Sample:
    """Makes the sample of a row whose image killed the process that decoded it."""
    return replace(sample_of(row), reason=DECODER_DIED)


def _make(shards: Shards, job: tuple[Due, tuple[Row, ...]]) -> tuple[int, int, ShardEntry | None]:
    due, rows = job
    return due.number, len(rows), shards.stage(due, map(shards.sample, rows))


def _make_carefully(shards: Shards, job: tuple[Due, tuple[Row, ...]]) -> tuple[int, int, ShardEntry | None]:
    """Makes a shard of which an image has killed the process, with processes between that image and this one."""
    due, rows = job
    return due.number, len(rows), shards.stage(due, surviving_map(shards.sample, rows, 2, given_up))


def _told(samples: Iterable[Sample], step: Callable[[int], None]) -> Iterator[Sample]:
    for sample in samples:
        step(1)
        yield sample
