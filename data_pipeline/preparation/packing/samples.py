"""Writes prepared rows to a shard on disk; a kill at any moment loses nothing and writes nothing twice.

A shard is three files that belong together: tar, sidecar, `_stats.json`. They grow under staging names; an empty
`.commit` file then says that all three are whole, they are renamed, and the mark goes. Whoever comes next either finds
the mark and finishes the renames, or finds none and throws the staging files away.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.durable import remove_leftovers, sync_folder, write_durably
from data_pipeline.errors import UserError
from data_pipeline.format import ShardEntry, ShardWriter, sidecar
from data_pipeline.format.manifest import AWAY, COMMIT, withdraw_manifest

STAGING = ".new"
_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
# Fields of every JSON member, where they are known; `Sample.fields` follow.
_JSON_FIELDS = ("key", "row", "url", "caption", "label", "label_name", "width", "height", "sha256")
KEY_DIGITS = 4  # of the place in the shard; img2dataset's keys: five digits of the shard, four of the place


@dataclass(frozen=True)
class Sample:
    """One input row after preparation: packed where `image` holds bytes, else rejected for `reason`.

    `extension` is the member's (jpg, png, webp), `format` the sidecar's name of it. `fields` go into the JSON member.
    `annotation` is a member of its own, called KEY.`annotation_member` (objects.json, labels.png).
    `dropped`: curation has left it out, for `reason`; it keeps its place in the shard.
    `sha256` is the image's, where it is known; `pdq` its perceptual hash and that one's quality. `further`: values of
    the sidecar's further columns. `empty_text`: a sample without a caption has a text member all the same, with nothing
    in it.
    """

    row: int
    image: bytes | None = None
    extension: str = "jpg"
    format: str = "jpeg"
    width: int | None = None
    height: int | None = None
    caption: str | None = None
    label: int | None = None
    url: str | None = None
    reason: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    annotation: bytes | None = None
    annotation_member: str = ""
    dropped: bool = False
    sha256: str | None = None
    pdq: tuple[str, int] | None = None
    further: Mapping[str, object] = field(default_factory=dict)
    empty_text: bool = False
    place: int | None = None  # in the shard, where it does not follow from the row's number


def check_rows_per_shard(count: int) -> None:
    """Raises UserError where keys have too few digits for the rows of a shard."""
    if not 1 <= count <= 10**KEY_DIGITS:
        raise UserError(f"rows_per_shard {count}: a shard holds 1 to {10**KEY_DIGITS} rows")


def shard_stem(number: int) -> str:
    """`00000`, `00001`, ..."""
    return f"{number:05d}"


def sample_key(number: int, place: int) -> str:
    """Key of the row at `place` of shard `number`: a function of the input row alone; retries never move a sample."""
    return f"{number:05d}{place:0{KEY_DIGITS}d}"


def pack_shard(
    folder: Path,
    number: int,
    first_row: int,
    samples: Iterable[Sample],
    *,
    classes: tuple[str, ...] | None = None,
    further: pa.Schema | None = None,
) -> ShardEntry:
    """Writes shard `number`, whose input rows begin at `first_row`, its sidecar and its statistics as one act.

    Arguments and result are those of `stage_shard`.
    """
    entry = stage_shard(folder, number, first_row, samples, classes=classes, further=further)
    commit_shard(folder, shard_stem(number))
    return entry


def stage_shard(
    folder: Path,
    number: int,
    first_row: int,
    samples: Iterable[Sample],
    *,
    classes: tuple[str, ...] | None = None,
    further: pa.Schema | None = None,
) -> ShardEntry:
    """Writes the files of a shard under their staging names, for `commit_shard`.

    `samples` come in the order of their rows; `further`: columns of the sidecar beyond its own. A sidecar that is
    written anew keeps the columns that were added to it. Returns the entry for the manifest.
    """
    stem = shard_stem(number)
    tar, parquet, stats = (folder / name for name in (f"{stem}.tar", f"{stem}.parquet", f"{stem}_stats.json"))
    rows: list[dict[str, Any]] = []
    with ShardWriter(staged(tar)) as shard:
        for sample in samples:
            place = sample.row - first_row if sample.place is None else sample.place
            rows.append(_add(shard, sample_key(number, place), sample, classes))
    columns = sidecar.joined_columns(further, sidecar.further_columns(parquet))
    sidecar.write_sidecar(staged(parquet), sidecar.table(rows, columns))
    entry = ShardEntry(tar.name, parquet.name, shard.samples, shard.bytes, shard.sha256)
    write_durably(staged(stats), (json.dumps(statistics(entry, rows), indent=1) + "\n").encode())
    return entry


def commit_shard(folder: Path, stem: str) -> None:
    """Makes the staged tar, sidecar and statistics of a shard its files, all three or none."""
    write_durably(mark := folder / (stem + COMMIT), b"")
    _finish(mark)


def recover(folder: Path) -> None:
    """Completes or removes what a killed writer left in a folder. Call while nobody else writes there."""
    for mark in sorted(folder.glob("*" + COMMIT)):
        _finish(mark)
    for path in folder.glob("*" + STAGING):
        path.unlink()
    remove_leftovers(folder)


def read_entry(folder: Path, number: int) -> ShardEntry | None:
    """Returns the entry of a whole shard, None where the shard is not whole, or its tar is gone or of another size and
    does not lie on object storage."""
    stem = shard_stem(number)
    try:
        stats = json.loads((folder / f"{stem}_stats.json").read_bytes())
        entry = ShardEntry(**stats["shard"])
        whole = is_away(folder, entry) or (folder / entry.name).stat().st_size == entry.bytes
        whole = whole and (folder / entry.sidecar).is_file()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return entry if whole else None


def is_away(folder: Path, entry: ShardEntry) -> bool:
    """Tells whether a shard's tar lies on object storage, as it was written last (`packing.away`)."""
    with suppress(FileNotFoundError):
        return (folder / entry.name).with_suffix(AWAY).read_text() == entry.sha256
    return False


def read_samples(folder: Path, entry: ShardEntry) -> Iterator[Sample]:
    """Reads a shard's rows as `pack_shard` got them, one after the other: written again, they give the same bytes.

    What curation decided stays: dropped samples are written again as dropped; of erased ones the row stays, rejected.
    """
    own = {*sidecar.SIDECAR_SCHEMA.names, *(field.name for field in sidecar.ANNOTATION_COLUMNS)}
    with open(folder / entry.name, "rb") as file:
        for row in sidecar.read_sidecar(folder / entry.sidecar).to_pylist():
            kept = {name: row[name] for name in ("row", "width", "height", "caption", "label", "url", "reason")}
            if row["status"] in (sidecar.PACKED, sidecar.DROPPED):
                kept["dropped"] = row["status"] == sidecar.DROPPED
                file.seek(row["json_offset"])
                content = json.loads(file.read(row["json_size"]))
                file.seek(row["image_offset"])
                kept["image"] = file.read(row["image_size"])
                kept["format"], kept["extension"] = row["image_format"], _EXTENSIONS[row["image_format"]]
                kept["fields"] = {name: value for name, value in content.items() if name not in _JSON_FIELDS}
                if row.get("annotation_size") is not None:
                    file.seek(row["annotation_offset"])
                    kept["annotation"] = file.read(row["annotation_size"])
                    kept["annotation_member"] = row["annotation_member"]
                kept["sha256"] = row["sha256"]
                kept["empty_text"] = row["caption"] is None and row["text_offset"] is not None
            kept["place"] = int(row["key"][-KEY_DIGITS:])
            kept["further"] = {name: row[name] for name in row if name not in own}
            yield Sample(**kept)


def _add(shard: ShardWriter, key: str, sample: Sample, classes: tuple[str, ...] | None) -> dict[str, Any]:
    """Packs one sample; returns its sidecar row."""
    in_shard = sidecar.DROPPED if sample.dropped else sidecar.PACKED
    row: dict[str, Any] = {
        "row": sample.row,
        "status": sidecar.REJECTED if sample.image is None else in_shard,
        "reason": sample.reason,
        "key": key,
        "url": sample.url,
        "caption": sample.caption,
        "label": sample.label,
        "width": sample.width,
        "height": sample.height,
        **sample.further,
    }
    if sample.image is None:
        return row
    digest = sample.sha256 or hashlib.sha256(sample.image).hexdigest()
    content = {
        "key": key,
        "row": sample.row,
        "url": sample.url,
        "caption": sample.caption,
        "label": sample.label,
        "label_name": None if classes is None or sample.label is None else classes[sample.label],
        "width": sample.width,
        "height": sample.height,
        "sha256": digest,
        **sample.fields,
    }
    members = {sample.extension: sample.image}
    if sample.caption is not None or sample.empty_text:
        members["txt"] = (sample.caption or "").encode()
    present = {name: value for name, value in content.items() if value is not None}
    members["json"] = json.dumps(present, ensure_ascii=False).encode()
    columns = [("image", sample.extension), ("text", "txt"), ("json", "json")]
    if sample.annotation is not None:
        members[sample.annotation_member] = sample.annotation
        columns.append(("annotation", sample.annotation_member))
        row["annotation_member"] = sample.annotation_member
        row["annotation_sha256"] = hashlib.sha256(sample.annotation).hexdigest()
    places = shard.add(key, members)
    row |= {"sha256": digest, "image_format": sample.format}
    if sample.pdq is not None:
        row |= dict(zip((sidecar.PDQ, sidecar.PDQ_QUALITY), sample.pdq, strict=True))
    for column, extension in columns:
        if extension in places:
            row |= {f"{column}_offset": places[extension].offset, f"{column}_size": places[extension].size}
    return row


def statistics(entry: ShardEntry, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What img2dataset's tools read (`count`, `successes`, `status_dict`), and our entry for the manifest."""
    reasons = Counter(row["reason"] for row in rows if row["status"] == sidecar.REJECTED)
    return {
        "count": len(rows),
        "successes": entry.samples,
        "failed": len(rows) - entry.samples,
        "status_dict": {"success": entry.samples, **dict(sorted(reasons.items()))},
        "shard": entry.as_json(),
    }


def staged(path: Path) -> Path:
    """Returns where a file of a shard is written before the shard is committed."""
    return path.with_name(path.name + STAGING)


def _finish(mark: Path) -> None:
    stem = mark.name.removesuffix(COMMIT)
    withdraw_manifest(mark.parent)  # the manifest describes the former shard
    for name in (f"{stem}.tar", f"{stem}.parquet", f"{stem}_stats.json"):
        with suppress(FileNotFoundError):  # done before a kill, or just now by the task that finishes the set
            os.replace(staged(mark.with_name(name)), mark.with_name(name))
    sync_folder(mark.parent)
    mark.unlink(missing_ok=True)
