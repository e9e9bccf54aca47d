"""Reads whole sets in manifest order, each sample once, centre-cropped: for scores, not for training."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data_pipeline.callbacks import EventSink
from data_pipeline.reading.batch import Batch, SampleRef
from data_pipeline.reading.config import CacheConfig
from data_pipeline.reading.decode.centre import render_centre
from data_pipeline.reading.decode.pixels import BadSample, DroppedSample
from data_pipeline.reading.faults import Fault, FaultLog
from data_pipeline.reading.storage.shards import ShardSet
from data_pipeline.reading.storage.sources import open_files
from data_pipeline.reading.targets import T, TargetSource, TargetSpec
from data_pipeline.reading.workers.memory import Layout, allocate

_OPEN_SHARDS = 4


def evaluation_batches(
    set_folder: Path | str,
    image_size: int,
    batch_size: int,
    targets: TargetSpec[T],
    *,
    crop_fraction: float = 1.0,
    rank: int = 0,
    world_size: int = 1,
    events: EventSink | None = None,
    max_bad_rate: float = 0.01,
    max_pixels: int = 100_000_000,
    cache: CacheConfig | None = None,
) -> Iterator[Batch[T]]:
    """Yields batches of one view, the last may be short: timm's centre crop of the image, decoded whole.

    crop_fraction: timm's `crop_pct`, the share of the shorter side that is kept.

    `positions` are the samples' numbers in the set. Ranks take contiguous shares whose lengths differ by one at most.
    A sample that curation dropped is left out; one that cannot be read is left out and recorded; above `max_bad_rate`
    BadDataError is raised. Labels are the set's own.
    """
    files = open_files(str(set_folder), cache or CacheConfig(), None)
    manifest = files.manifest
    first, last = (manifest.samples * r // world_size for r in (rank, rank + 1))
    starts = np.concatenate([[0], np.cumsum([shard.samples for shard in manifest.shards])])
    shards = ShardSet(files, keep=_OPEN_SHARDS, members=targets.members)
    source = TargetSource(captions=True, labels=True)
    log = FaultLog(max_bad_rate, events)

    try:
        for step, start in enumerate(range(first, last, batch_size)):
            positions = np.arange(start, min(start + batch_size, last), dtype=np.int64)
            layout: Layout = {
                "views": ((len(positions), 1, image_size, image_size, 3), np.uint8),
                "crops": ((len(positions), 1, 6), np.float32),
            }
            arrays = allocate(layout | targets.layout(len(positions)))
            kept: list[int] = []
            samples: list[SampleRef] = []
            extras: list[object] = []
            faults: list[Fault] = []
            for position in positions.tolist():
                number = int(np.searchsorted(starts, position, side="right")) - 1
                row, place = position - int(starts[number]), len(kept)
                ref = SampleRef(manifest.name, manifest.shards[number].name, shards.shard(number).key(row), row)
                try:
                    raw = shards.shard(number).read(row)
                    view, crop = render_centre(raw.image, max_pixels, image_size, crop_fraction)
                    arrays["views"][place, 0], arrays["crops"][place, 0] = view, crop
                    extras.append(targets.write(place, raw, source, arrays["crops"][place], arrays))
                except DroppedSample:
                    continue
                except BadSample as bad:
                    faults.append(Fault(position, *ref, bad.reason, bad.detail, ("", "")))
                    continue
                kept.append(position)
                samples.append(ref)
            log.add(step, positions, faults)
            log.check()
            if kept:
                arrays = {name: array[: len(kept)] for name, array in arrays.items()}
                targets.finish(extras, arrays)
                views, crops = (torch.from_numpy(arrays[name]) for name in ("views", "crops"))
                yield Batch(step, 0, torch.tensor(kept), views, crops, targets.collate(arrays, extras), tuple(samples))
    finally:
        shards.close()
