"""Perceptual hashes of the images of a set, as the columns `pdq` and `pdq_quality` of its sidecars: made once a row."""

from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.curation.decisions import need_tars
from data_pipeline.executors.processes import available, ordered_map
from data_pipeline.format import Manifest, ShardEntry, read_sidecar, write_sidecar
from data_pipeline.format.pdq import MOST_PIXELS_A_SIDE, Pdq, pdq
from data_pipeline.format.sidecar import DROPPED, PACKED, PDQ, PDQ_COLUMNS, PDQ_QUALITY
from data_pipeline.reading.decode.pixels import BadSample, can_reduce, decode, read_header

_MAX_PIXELS = 178_956_970
_WITH_BYTES = (PACKED, DROPPED)


def add_hashes(one: Manifest, workers: int | None = None, progress: ProgressCallback | None = None) -> int:
    """Hashes the images that have no hash yet, used or dropped; returns how many shards had such images, or no columns.

    An image that cannot be decoded has the quality 0 and no hash. A shard is done once its sidecar is written: a killed
    run goes on there. Raises UserError where images are due whose tar is not there.
    """
    missing = [entry for entry in one.shards if _is_due(one.sidecar_path(entry))]
    need_tars((one, entry) for entry in missing)
    work = partial(_hash_shard, one)
    for done, _ in enumerate(ordered_map(work, missing, available() if workers is None else workers, chunk=1)):
        if progress is not None:
            progress(done + 1, len(missing))
    return len(missing)


def _is_due(sidecar: Path) -> bool:
    """Tells whether rows lack hashes: of none at all, or of those that were packed or used again since."""
    if not {PDQ, PDQ_QUALITY} <= set(pq.read_schema(sidecar).names):
        return True
    rows = read_sidecar(sidecar, ["status", PDQ_QUALITY])
    with_bytes = pc.is_in(rows["status"], pa.array(_WITH_BYTES))
    return bool(rows.filter(with_bytes)[PDQ_QUALITY].null_count)


def _hash_shard(one: Manifest, entry: ShardEntry) -> None:
    path = one.sidecar_path(entry)
    rows = read_sidecar(path)
    metadata = rows.schema.metadata
    for field in PDQ_COLUMNS:
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    bits, qualities = rows[PDQ].to_pylist(), rows[PDQ_QUALITY].to_pylist()
    places = zip(*(rows[name].to_pylist() for name in ("status", "image_offset", "image_size")), strict=True)
    with open(one.shard_path(entry), "rb") as file:
        for row, (status, offset, size) in enumerate(places):
            if status in _WITH_BYTES and qualities[row] is None:
                file.seek(offset)
                bits[row], qualities[row] = hash_image(file.read(size)) or (None, 0)
    for field, values in zip(PDQ_COLUMNS, (bits, qualities), strict=True):
        rows = rows.set_column(rows.column_names.index(field.name), field, pa.array(values, field.type))
    write_sidecar(path, rows.replace_schema_metadata(metadata))


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
