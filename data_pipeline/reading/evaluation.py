"""Whole sets in manifest order, each sample once, centre-cropped: for scores, not for training."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data_pipeline.format import Manifest, open_set
from data_pipeline.reading.assembly import Fault, Tokenizer
from data_pipeline.reading.batch import Batch, SampleRef
from data_pipeline.reading.config import CacheConfig
from data_pipeline.reading.decode import BadSample, can_reduce, decode, read_header
from data_pipeline.reading.faults import Events, FaultLog
from data_pipeline.reading.remote import is_remote, open_remote
from data_pipeline.reading.shards import Files, LocalFiles, RawSample, ShardSet
from data_pipeline.reading.views import centre_crop, enlarged, on_reduced, one_thread, reduction, render

_OPEN_SHARDS = 4


def evaluation_batches(
    set_folder: Path | str,
    image_size: int,
    batch_size: int,
    *,
    tokenizer: Tokenizer | None = None,
    crop_fraction: float = 1.0,
    rank: int = 0,
    world_size: int = 1,
    index_folder: Path | str | None = None,
    events: Events | None = None,
    max_bad_rate: float = 0.01,
    max_pixels: int = 100_000_000,
    cache: CacheConfig | None = None,
) -> Iterator[Batch]:
    """Batches of one view (the centre square of `crop_fraction` of the shorter side); the last may be short.

    `positions` are the samples' numbers in the set. Ranks take contiguous shares whose lengths differ by one at most.
    A sample that cannot be read is left out and recorded; above `max_bad_rate` BadDataError is raised. Labels are the
    set's own.
    """
    files: Files
    if is_remote(str(set_folder)):
        files = remote = open_remote(str(set_folder), cache or CacheConfig())
        manifest = remote.manifest
    else:
        manifest = open_set(set_folder, index_folder)
        files = LocalFiles(manifest)
    first, last = (manifest.samples * r // world_size for r in (rank, rank + 1))
    starts = np.concatenate([[0], np.cumsum([shard.samples for shard in manifest.shards])])
    shards = ShardSet(manifest, files, keep=_OPEN_SHARDS)
    log = FaultLog(max_bad_rate, events)
    try:
        for step, start in enumerate(range(first, last, batch_size)):
            positions = np.arange(start, min(start + batch_size, last), dtype=np.int64)
            faults: list[Fault] = []
            found = []
            with one_thread():
                for position in positions:
                    number = int(np.searchsorted(starts, position, side="right")) - 1
                    row = int(position - starts[number])
                    try:
                        raw = shards.shard(number).read(row)
                        view, crop = _view(raw.image, image_size, crop_fraction, max_pixels)
                        found.append((int(position), number, row, raw, view, crop))
                    except BadSample as bad:
                        entry, key = manifest.shards[number], shards.shard(number).key(row)
                        faults.append(
                            Fault(int(position), manifest.name, entry.name, key, row, bad.reason, bad.detail, ("", ""))
                        )
            log.add(step, positions, faults)
            log.check()
            if found:
                yield _batch(step, manifest, found, tokenizer)
    finally:
        shards.close()


def _view(data: bytes, size: int, fraction: float, max_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    header = read_header(data, max_pixels)
    crop = centre_crop(header.width, header.height, fraction)
    reduce = reduction([crop], size) if can_reduce(header) else 1
    pixels = decode(data, header, reduce)
    if reduce > 1:
        crop = on_reduced(crop, reduce, pixels)
    view = np.empty((size, size, 3), np.uint8)
    render(pixels, crop, view)
    return view, np.array(enlarged(crop, reduce), np.float32)


def _batch(
    step: int,
    manifest: Manifest,
    found: list[tuple[int, int, int, RawSample, np.ndarray, np.ndarray]],
    tokenizer: Tokenizer | None,
) -> Batch:
    captions = tuple(raw.caption for _, _, _, raw, _, _ in found)
    labels = torch.tensor([-1 if raw.label is None else raw.label for _, _, _, raw, _, _ in found])
    has_text = torch.tensor([caption is not None for caption in captions])
    if tokenizer is None:
        tokens = torch.zeros(len(found), 0, dtype=torch.int64)
    else:
        tokens = torch.as_tensor(tokenizer([caption or "" for caption in captions])).long() * has_text[:, None]
    return Batch(
        step=step,
        micro=0,
        positions=torch.tensor([position for position, *_ in found]),
        views=torch.from_numpy(np.stack([view for *_, view, _ in found])[:, None]),
        crops=torch.from_numpy(np.stack([crop for *_, crop in found])[:, None]),
        tokens=tokens,
        has_text=has_text,
        labels=labels,
        has_label=labels >= 0,
        samples=tuple(
            SampleRef(manifest.name, manifest.shards[n].name, raw.key, row) for _, n, row, raw, _, _ in found
        ),
        captions=captions,
    )
