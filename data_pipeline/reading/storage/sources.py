"""Opens the sets that a configuration names, and joins their categories."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.callbacks import EventSink, Heartbeat
from data_pipeline.errors import BadDataError
from data_pipeline.format import open_set
from data_pipeline.format.reasons import EMPTY_SHARD
from data_pipeline.format.sets import SHARD_INDEX_SUFFIX
from data_pipeline.reading.config import CacheConfig, DataConfig
from data_pipeline.reading.events import DAMAGED_SHARD
from data_pipeline.reading.faults import REMEDY, too_many
from data_pipeline.reading.storage.damage import index_damage
from data_pipeline.reading.storage.remote import cache_folder, is_remote, node_index_folder, open_remote
from data_pipeline.reading.storage.shards import LocalFiles, ShardFiles, ShardSet

_EXTRA_SHARDS = 2  # kept open beyond a block, for batches that reach into the next block


@dataclass(frozen=True)
class SourceRecord:
    """What stays known of a source where its set is gone or moved.

    digest: SHA-256 over the digests of its shards, "" for a stream. about: what its manifest says of origin, licence.
    """

    name: str
    path: str
    samples: int
    weight: float
    digest: str = ""
    about: dict[str, str] = field(default_factory=dict)


def record_sources(config: DataConfig, names: Sequence[str], sets: Sequence[ShardSet]) -> tuple[SourceRecord, ...]:
    """One record a source. sets: in the order of `config.sources`; none where these are streams."""
    if not sets:
        return tuple(
            SourceRecord(name, source.path, source.samples or 0, source.weight)
            for name, source in zip(names, config.sources, strict=True)
        )
    return tuple(
        SourceRecord(
            name,
            source.path,
            one.manifest.samples,
            source.weight,
            hashlib.sha256("".join(shard.sha256 for shard in one.manifest.shards).encode()).hexdigest(),
            {key: value for key, value in one.manifest.about.items() if isinstance(value, str)},
        )
        for name, source, one in zip(names, config.sources, sets, strict=True)
    )


def open_sources(
    config: DataConfig, events: EventSink | None, heartbeat: Heartbeat | None = None, members: Sequence[str] = ()
) -> tuple[list[str], list[ShardSet]]:
    """Opens `config.sources`; returns names and sets. A set without an index gets one, once a node (other processes
    wait); meanwhile `heartbeat` is called. `members`: what of each sample is read besides its image.

    `events` gets what indexing found damaged. Raises UserError for a missing or empty set, BadDataError for one with
    more damage than `config.max_bad_rate`.
    """
    names: list[str] = []
    sets: list[ShardSet] = []
    for number, source in enumerate(config.sources):
        node = node_index_folder(str(Path(source.path).resolve()), config.cache)
        files = open_files(source.path, config.cache, node, heartbeat)
        manifest = files.manifest
        name = source.name or manifest.name
        names.append(f"{name}-{number}" if name in names else name)
        if any(shard.sidecar.endswith(SHARD_INDEX_SUFFIX) for shard in manifest.shards):
            _report_damage(index_damage(manifest), manifest.samples, names[-1], config.max_bad_rate, events)
        if manifest.samples == 0:
            count = len(manifest.shards)
            raise BadDataError(f"{source.path}: none of its {count} shard(s) holds a sample that can be used")
        for shard in manifest.shards:
            if shard.samples == 0 and events is not None and not shard.sidecar.endswith(SHARD_INDEX_SUFFIX):
                events(_damaged(names[-1], shard.name, EMPTY_SHARD, 1))
        keep = config.block_shards + _EXTRA_SHARDS
        sets.append(ShardSet(files, keep=keep, members=members, shared=cache_folder(config.cache) / "columns"))
    return names, sets


def open_files(
    path: str, cache: CacheConfig, index_folder: Path | None, heartbeat: Heartbeat | None = None
) -> ShardFiles:
    """Opens the set at a URL or in a folder; a folder without an index is indexed into `index_folder`."""
    if is_remote(path):
        return open_remote(path, cache, heartbeat=heartbeat)
    return LocalFiles(open_set(path, index_folder, heartbeat=heartbeat))


def merge_classes(
    sets: Sequence[tuple[str, ...] | None],
) -> tuple[tuple[str, ...] | None, list[np.ndarray | None]]:
    """Joins the categories of several sets by name, in order of appearance; returns each set's numbers in them, too.

    sets: each set's categories; None where it has none, or where its labels are left out.
    """
    joined: dict[str, int] = {}
    numbers: list[np.ndarray | None] = []
    for classes in sets:
        if classes is None:
            numbers.append(None)
            continue
        if len(set(classes)) != len(classes):  # ImageNet has two cranes and two maillots: names stay apart by number
            classes = tuple(f"{name} #{n}" if classes.count(name) > 1 else name for n, name in enumerate(classes))
        numbers.append(np.array([joined.setdefault(name, len(joined)) for name in classes], dtype=np.int64))
    return tuple(joined) or None, numbers


def _report_damage(
    found: list[tuple[str, str, int]], samples: int, name: str, rate: float, events: EventSink | None
) -> None:
    for shard, reason, count in found:
        if events is not None:
            events(_damaged(name, shard, reason, count))
    found = [item for item in found if item[1] != EMPTY_SHARD]  # an empty shard is no bad sample of its own
    bad = sum(count for _, _, count in found)
    if bad and too_many(bad, seen := samples + bad, rate):
        worst = sorted(found, key=lambda item: -item[2])[:8]
        shards = "; ".join(f"{shard}: {count} x {reason}" for shard, reason, count in worst)
        damaged = f"source {name}: {bad} of {seen} samples are damaged, above data.max_bad_rate {rate}"
        raise BadDataError(f"{damaged}: {shards}. {REMEDY}")


def _damaged(source: str, shard: str, reason: str, samples: int) -> dict[str, Any]:
    return {"kind": DAMAGED_SHARD, "source": source, "shard": shard, "reason": reason, "samples": samples}
