"""Looks samples up in their sidecars: URL, caption, label, digest."""

from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from data_pipeline.format import Manifest, slot_rows
from data_pipeline.hashing import Integers
from data_pipeline.reading.decode.pixels import BadSample
from data_pipeline.reading.order.samples import Located
from data_pipeline.reading.storage.shards import ShardSet

_COLUMNS = ["status", "key", "url", "sha256", "caption", "label"]


def describe_samples(
    located: Located, positions: Integers, names: Sequence[str], sets: Sequence[ShardSet]
) -> list[dict[str, Any]]:
    """Returns one dictionary a position; reads each sidecar once."""
    sidecars: dict[tuple[int, int], list[dict[str, Any]]] = {}
    found = []
    for position, source, epoch, shard, row in zip(positions.tolist(), *(c.tolist() for c in located), strict=True):
        if (source, shard) not in sidecars:
            sidecars[source, shard] = _rows(sets[source], shard)
        place = {"position": position, "source": names[source], "epoch": epoch}
        found.append(place | _record(sets[source].manifest, shard, row, sidecars[source, shard]))
    return found


def describe_sample(one: ShardSet, shard: str, key: str) -> dict[str, Any]:
    """Returns the dictionary of the sample `key` of a shard, without its place in the order; a lost one has nulls."""
    number = next((n for n, entry in enumerate(one.manifest.shards) if entry.name == shard), None)
    rows = [] if number is None else _rows(one, number)
    row = next((n for n, said in enumerate(rows) if said["key"] == key), None)
    if number is None or row is None:
        return {"shard": shard, "key": key, "url": None, "caption": None, "label": None}
    return _record(one.manifest, number, row, rows)


def _record(manifest: Manifest, shard: int, row: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    said = rows[row] if row < len(rows) else {}
    label = said.get("label")
    if label is not None and manifest.classes is not None and label < len(manifest.classes):
        label = manifest.classes[label]
    return {
        "shard": manifest.shards[shard].name,
        "row": row,
        "key": said.get("key", ""),
        "url": said.get("url"),
        "caption": said.get("caption"),
        "label": label,
        "sha256": said.get("sha256"),
    }


def _rows(one: ShardSet, shard: int) -> list[dict[str, Any]]:
    """Reads the slots of a sidecar; none where it is unreadable, which the reader records as a fault."""
    try:
        with pq.ParquetFile(one.files.sidecar(one.manifest.shards[shard])) as file:
            rows: list[dict[str, Any]] = slot_rows(file.read(columns=_COLUMNS)).to_pylist()
            return rows
    except (BadSample, OSError, ValueError, KeyError):  # pyarrow's own errors are ValueErrors and OSErrors
        return []
