"""Writes one new shard from rows of old ones: the members' bytes are copied, no image is encoded anew."""

import hashlib
import json
import mmap
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.curation.plans import FROM_KEY, FROM_ROW, FROM_SET, Plan
from data_pipeline.durable import TEMPORARY, write_durably
from data_pipeline.format import Manifest, ShardEntry, ShardWriter, read_sidecar, ustar, write_sidecar
from data_pipeline.format.manifest import COMMIT, parse_manifest
from data_pipeline.format.sets import SHARD_INDEX_SUFFIX
from data_pipeline.format.sidecar import PACKED, PARTS, REJECTED
from data_pipeline.preparation.packing.samples import (
    commit_shard,
    read_entry,
    sample_key,
    shard_stem,
    staged,
    statistics,
)
from data_pipeline.reading.storage.sources import merge_classes

_OPEN_SHARDS = 64
_KEY_BYTES = 80  # of the 100 that ustar gives a name; extensions take the rest
Members = dict[str, tuple[int, int]]  # extension -> offset, size


@dataclass(frozen=True)
class Repack:
    """The unit of work: call it with a unit's number. sets: folder and index folder of each source."""

    output: Path
    sets: tuple[tuple[Path, Path], ...]

    def __call__(self, number: int) -> None:
        """Writes the shard, unless it is whole."""
        plan = Plan.read(self.output)
        if plan is None:  # another task has finished the sets meanwhile
            return
        folder, shard = plan.place(number)
        folder.mkdir(parents=True, exist_ok=True)
        stem = shard_stem(shard)
        if (folder / (stem + COMMIT)).exists():  # whoever held this unit died while renaming
            commit_shard(folder, stem)
        for path in (*folder.glob(f".{stem}.*{TEMPORARY}"), *folder.glob(f".{stem}_*{TEMPORARY}")):
            path.unlink(missing_ok=True)
        if read_entry(folder, shard) is None:
            _write_shard(plan, number, _sources(self.sets))


@dataclass(frozen=True)
class Source:
    """An old set: its name among all sources, and the new numbers of its labels."""

    manifest: Manifest
    name: str
    labels: np.ndarray[Any, Any] | None

    def foreign(self, entry: ShardEntry) -> bool:
        return entry.sidecar.endswith(SHARD_INDEX_SUFFIX)


@lru_cache(maxsize=1)
def _sources(sets: tuple[tuple[Path, Path], ...]) -> tuple[Source, ...]:
    found = [
        parse_manifest((index / "manifest.json").read_bytes(), folder, where=str(index), index_folder=index)
        for folder, index in sets
    ]
    return name_sources(found)


def name_sources(sets: list[Manifest]) -> tuple[Source, ...]:
    """Gives every source a name of its own, and joins their classes."""
    _, numbers = merge_classes([one.classes for one in sets])
    names: list[str] = []
    for n, one in enumerate(sets):
        names.append(f"{one.name}-{n}" if one.name in names else one.name)
    return tuple(Source(*parts) for parts in zip(sets, names, numbers, strict=True))


def _write_shard(plan: Plan, unit: int, sources: tuple[Source, ...]) -> None:
    folder, number = plan.place(unit)
    stem = shard_stem(number)
    ids, first, columns = plan.rows(unit)
    shards = [(source, entry) for source in sources for entry in source.manifest.shards]
    rows = _old_rows(ids, shards)
    tar, parquet, stats = (folder / name for name in (f"{stem}.tar", f"{stem}.parquet", f"{stem}_stats.json"))
    made: list[dict[str, Any]] = []
    with ShardWriter(staged(tar)) as writer, _Bytes() as contents:
        for place, row_id in enumerate(ids):
            source, entry = shards[row_id >> 32]
            row = rows[row_id]
            row |= {"row": first + place}
            image, members = contents.of(source, entry, row) if row["status"] == PACKED else ("", {})
            made.append(_add(writer, plan, source, entry, row, image, members, sample_key(number, len(made) % 10_000)))
    write_sidecar(staged(parquet), pa.Table.from_pylist(made, schema=columns))
    entry = ShardEntry(tar.name, parquet.name, writer.samples, writer.bytes, writer.sha256)
    write_durably(staged(stats), (json.dumps(statistics(entry, made), indent=1) + "\n").encode())
    commit_shard(folder, stem)


def _old_rows(ids: list[int], shards: list[tuple[Source, ShardEntry]]) -> dict[int, dict[str, Any]]:
    """Reads the rows with these ids, each sidecar once, and adds where they come from."""
    by_sidecar: dict[int, list[int]] = {}
    for row_id in ids:
        by_sidecar.setdefault(row_id >> 32, []).append(row_id)
    found: dict[int, dict[str, Any]] = {}
    for sidecar, mine in by_sidecar.items():
        source, entry = shards[sidecar]
        table = read_sidecar(source.manifest.sidecar_path(entry))
        for row_id, row in zip(mine, table.take([row_id & 0xFFFFFFFF for row_id in mine]).to_pylist(), strict=True):
            if row.get(FROM_SET) is None:
                row |= {FROM_SET: source.name, FROM_ROW: row["row"], FROM_KEY: row["key"]}
            found[row_id] = row
    return found


def _add(
    writer: ShardWriter,
    plan: Plan,
    source: Source,
    entry: ShardEntry,
    row: dict[str, Any],
    image: str,
    members: Mapping[str, bytes],
    spare: str,
) -> dict[str, Any]:
    """Copies a sample into the shard; returns its new sidecar row. image: the extension of the member that is it."""
    # By name: a further column of the input may end in `_offset` or `_size`, too, and say something else.
    places = {name: None for part in PARTS for name in (f"{part}_offset", f"{part}_size") if name in row}
    old_label = row["label"]
    if row["label"] is not None and source.labels is not None:
        row |= {"label": int(source.labels[row["label"]])}
    if row["status"] != PACKED:
        return row | places | {"status": REJECTED}
    if row["sha256"] is not None and hashlib.sha256(members[image]).hexdigest() != row["sha256"]:
        return row | places | {"status": REJECTED, "reason": "image_damaged"}
    prefix = {"kept": "", "by_set": source.name, "by_shard": f"{source.name}-{Path(entry.name).stem}"}[plan.keys]
    key = f"{prefix}-{row['key']}" if prefix else row["key"]
    if not key.isascii() or "." in key or len(key) > _KEY_BYTES:
        key = spare
    if (key, row["label"]) != (row["key"], old_label):
        members = _told(members, key, row["label"])
    lie = writer.add(key, members)
    row |= places | {"key": key}
    annotation = row.get("annotation_member") or ""
    for column, extension in (("image", image), ("text", "txt"), ("json", "json"), ("annotation", annotation)):
        if extension in lie:
            row |= {f"{column}_offset": lie[extension].offset, f"{column}_size": lie[extension].size}
    return row


def _told(members: Mapping[str, bytes], key: str, label: int | None) -> dict[str, bytes]:
    """Writes a new key and label number into the members that hold them."""
    changed = dict(members)
    with suppress(KeyError, ValueError):
        content = json.loads(changed["json"])
        if isinstance(content, dict):
            content |= {name: value for name, value in (("key", key), ("label", label)) if name in content}
            changed["json"] = json.dumps(content, ensure_ascii=False).encode()
    if "cls" in changed and label is not None:
        changed["cls"] = str(label).encode()
    return changed


class _Bytes:
    """Reads the members of samples, from shards of which the last few stay open."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, mmap.mmap] = OrderedDict()
        self._members: dict[Path, dict[str, Members]] = {}

    def of(self, source: Source, entry: ShardEntry, row: Mapping[str, Any]) -> tuple[str, dict[str, bytes]]:
        """Returns a sample's members by extension, and which of them is the image."""
        path = source.manifest.shard_path(entry)
        if path not in self._maps:
            with open(path, "rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self._maps) > _OPEN_SHARDS:
                oldest, former = self._maps.popitem(last=False)
                self._members.pop(oldest, None)
                former.close()
        self._maps.move_to_end(path)
        data = self._maps[path]
        told = not source.foreign(entry) and _is_told(path, source.manifest.sidecar_path(entry), entry.sha256)
        places = _own(data, row) if told else self._walked(path, data)[row["key"]]
        image = next(name for name, (offset, _) in places.items() if offset == row["image_offset"])
        return image, {extension: bytes(data[offset : offset + size]) for extension, (offset, size) in places.items()}

    def _walked(self, path: Path, data: mmap.mmap) -> dict[str, Members]:
        """Lists the members of a shard whose sidecar may not know all of them."""
        if path not in self._members:
            found: dict[str, Members] = {}
            for member in ustar.walk(data):
                if isinstance(member, ustar.TarMember) and member.kind in (b"0", b"7"):
                    key, extension = ustar.sample_name(member.name)
                    found.setdefault(key, {}).setdefault(extension, (member.offset, member.size))
            self._members[path] = found
        return self._members[path]

    def __enter__(self) -> "_Bytes":
        return self

    def __exit__(self, *_: object) -> None:
        for data in self._maps.values():
            data.close()


@cache
def _is_told(tar: Path, sidecar: Path, _sha256: str) -> bool:
    """Tells whether the sidecar knows every member: those that it knows lie side by side, and nothing behind them.

    Members of a foreign shard that has been resharded may have no column there. Asked once a shard and process, not for
    every shard that takes samples from it; by its digest, so that one that was rewritten is looked at anew.
    """
    rows = read_sidecar(sidecar, [f"{part}_{what}" for part in PARTS for what in ("offset", "size")])
    length, end = 0, 0
    for part in PARTS:
        if f"{part}_offset" in rows.column_names:
            placed = rows.filter(pc.is_valid(rows[f"{part}_offset"]))
            offsets, sizes = (placed[f"{part}_{what}"].to_numpy() for what in ("offset", "size"))
            padded = -(-sizes // ustar.BLOCK_BYTES) * ustar.BLOCK_BYTES
            length += int((padded + ustar.BLOCK_BYTES).sum())
            end = max(end, int((offsets + padded).max(initial=0)))
    with open(tar, "rb") as file:
        file.seek(end)
        return length == end and not any(file.read(ustar.BLOCK_BYTES))


def _own(data: mmap.mmap, row: Mapping[str, Any]) -> Members:
    """Lists the members of a sample whose every member has its place in the sidecar."""
    places: Members = {}
    for part in sorted(PARTS, key=lambda part: row.get(f"{part}_offset") or 0):
        offset = row.get(f"{part}_offset")
        if offset is not None:
            name = (
                bytes(data[offset - ustar.BLOCK_BYTES : offset - ustar.BLOCK_BYTES + 100]).split(b"\0", 1)[0].decode()
            )
            places[ustar.sample_name(name)[1]] = (offset, row[f"{part}_size"])
    return places
