"""From the samples of a batch back to what their sidecars say: where they came from."""

from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from data_pipeline.format import packed_rows
from data_pipeline.reading.decode import BadSample
from data_pipeline.reading.hashing import Integers
from data_pipeline.reading.order import Located
from data_pipeline.reading.shards import ShardSet

_COLUMNS = ["status", "key", "url", "sha256", "caption", "label"]


def describe(
    located: Located, positions: Integers, names: Sequence[str], sets: Sequence[ShardSet]
) -> list[dict[str, Any]]:
    """One dictionary a position; each sidecar is read once."""
    sidecars: dict[tuple[int, int], list[dict[str, Any]]] = {}
    found = []
    for position, source, epoch, shard, row in zip(positions.tolist(), *(c.tolist() for c in located), strict=True):
        manifest = sets[source].manifest
        if (source, shard) not in sidecars:
            sidecars[source, shard] = _rows(sets[source], shard)
        rows = sidecars[source, shard]
        said = rows[row] if row < len(rows) else {}
        label = said.get("label")
        if label is not None and manifest.classes is not None and label < len(manifest.classes):
            label = manifest.classes[label]
        found.append(
            {
                "position": position,
                "source": names[source],
                "epoch": epoch,
                "shard": manifest.shards[shard].name,
                "row": row,
                "key": said.get("key", ""),
                "url": said.get("url"),
                "caption": said.get("caption"),
                "label": label,
                "sha256": said.get("sha256"),
            }
        )
    return found


def _rows(one: ShardSet, shard: int) -> list[dict[str, Any]]:
    """The packed rows of a sidecar; none where it cannot be read, which reading records."""
    try:
        with pq.ParquetFile(one.files.sidecar(one.manifest.shards[shard])) as file:
            rows: list[dict[str, Any]] = packed_rows(file.read(columns=_COLUMNS)).to_pylist()
            return rows
    except (BadSample, OSError, ValueError, KeyError):  # pyarrow's own errors are ValueErrors and OSErrors
        return []
