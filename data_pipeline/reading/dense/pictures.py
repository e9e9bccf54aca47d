"""Whole pictures of a set with their annotations, each once and in the set's order: for scores, not for training."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.callbacks import EventSink
from data_pipeline.reading.batch import SampleRef
from data_pipeline.reading.config import CacheConfig
from data_pipeline.reading.decode.pixels import BadSample, DroppedSample, Pixels, decode, read_header
from data_pipeline.reading.dense.objects import MEMBER
from data_pipeline.reading.faults import Fault, FaultLog
from data_pipeline.reading.storage.shards import RawSample, ShardSet
from data_pipeline.reading.storage.sources import open_files

_OPEN_SHARDS = 4


@dataclass(frozen=True)
class WholePicture:
    """pixels: uint8 [H, W, 3]. raw: the sample as it stands in its shard, with its annotation."""

    position: int
    ref: SampleRef
    pixels: Pixels
    raw: RawSample


def whole_pictures(
    set_folder: Path | str,
    *,
    events: EventSink | None = None,
    max_bad_rate: float = 0.01,
    max_pixels: int = 100_000_000,
) -> Iterator[WholePicture]:
    """A picture that cannot be read is left out and recorded; above `max_bad_rate` BadDataError is raised."""
    files = open_files(str(set_folder), CacheConfig(), None)
    manifest = files.manifest
    shards = ShardSet(files, keep=_OPEN_SHARDS, members=(MEMBER,))
    log = FaultLog(max_bad_rate, events)
    position = 0
    try:
        for number, entry in enumerate(manifest.shards):
            for row in range(entry.samples):
                ref = SampleRef(manifest.name, entry.name, shards.shard(number).key(row), row)
                faults = []
                try:
                    raw = shards.shard(number).read(row)
                    pixels = decode(raw.image, read_header(raw.image, max_pixels))
                    yield WholePicture(position, ref, pixels, raw)
                except DroppedSample:
                    pass  # curation left the sample out, which is no fault
                except BadSample as bad:
                    faults.append(Fault(position, *ref, bad.reason, bad.detail, ("", "")))
                log.add(position, np.array([position]), faults)
                log.check()
                position += 1
    finally:
        shards.close()
