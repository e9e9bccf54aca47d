"""Perceptual hashes of the images of a set, as the columns `pdq` and `pdq_quality` of its sidecars: made once."""

from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.curation.decisions import need_tars
from data_pipeline.executors.processes import available, ordered_map
from data_pipeline.format import Manifest, ShardEntry, read_sidecar, write_sidecar
from data_pipeline.format.pdq import MOST_PIXELS_A_SIDE, Pdq, pdq
from data_pipeline.format.sidecar import PACKED, PDQ, PDQ_COLUMNS
from data_pipeline.reading.decode.pixels import BadSample, can_reduce, decode, read_header

_MAX_PIXELS = 178_956_970


def add_hashes(one: Manifest, workers: int | None = None, progress: ProgressCallback | None = None) -> int:
    """Hashes the images of every shard whose sidecar has no hashes yet; returns how many shards these were.

    An image that cannot be decoded has none. A shard is done once its sidecar is written: a killed run goes on there.
    """
    missing = [entry for entry in one.shards if PDQ not in pq.read_schema(one.sidecar_path(entry)).names]
    need_tars((one, entry) for entry in missing)
    work = partial(_hash_shard, one)
    for done, _ in enumerate(ordered_map(work, missing, available() if workers is None else workers, chunk=1)):
        if progress is not None:
            progress(done + 1, len(missing))
    return len(missing)


def _hash_shard(one: Manifest, entry: ShardEntry) -> None:
    path = one.sidecar_path(entry)
    rows = read_sidecar(path)
    bits: list[str | None] = []
    qualities: list[int | None] = []
    with open(one.shard_path(entry), "rb") as file:
        for status, offset, size in zip(
            *(rows[name].to_pylist() for name in ("status", "image_offset", "image_size")), strict=True
        ):
            found = None
            if status == PACKED:
                file.seek(offset)
                found = hash_image(file.read(size))
            bits.append(found and found[0])
            qualities.append(found and found[1])
    for field, values in zip(PDQ_COLUMNS, (bits, qualities), strict=True):
        rows = rows.append_column(field, pa.array(values, field.type))
    write_sidecar(path, rows)


def hash_image(data: bytes) -> Pdq | None:
    """Hashes an encoded image, decoded no larger than needed; None for one that cannot be decoded."""
    try:
        header = read_header(data, _MAX_PIXELS)
        reduce = 1
        while can_reduce(header) and reduce < 8 and min(header.width, header.height) >= 2 * reduce * MOST_PIXELS_A_SIDE:
            reduce *= 2
        return pdq(decode(data, header, reduce))
    except BadSample:
        return None
