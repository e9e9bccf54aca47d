"""Lists what indexing found wrong in foreign sets: from the sidecars once, then from a summary beside them."""

import json
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq

from data_pipeline.durable import write_durably
from data_pipeline.format import Manifest, count_reasons, read_sidecar
from data_pipeline.format.manifest import SET_MANIFEST

_NAME = "damage.json"


def index_damage(manifest: Manifest) -> list[tuple[str, str, int]]:
    """Returns (shard, reason, rows rejected for that reason) of every shard that has rejected rows."""
    summary = manifest.index_folder / _NAME
    state = (manifest.index_folder / SET_MANIFEST).stat().st_mtime_ns
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(summary.read_bytes())
        if kept["manifest"] == state:
            return [(str(shard), str(reason), int(count)) for shard, reason, count in kept["damage"]]
    found = []
    for shard in manifest.shards:
        path = manifest.sidecar_path(shard)
        if _has_rejected(path, shard.samples):
            found += [(shard.name, reason, count) for reason, count in count_reasons(read_sidecar(path)).items()]
    with suppress(OSError):  # without a summary the next start takes longer, no more
        write_durably(summary, json.dumps({"manifest": state, "damage": found}).encode())
    return found


def _has_rejected(path: Path, samples: int) -> bool:
    """Tells whether a sidecar has rejected rows, from the file's footer alone."""
    return int(pq.read_metadata(path).num_rows) != samples
