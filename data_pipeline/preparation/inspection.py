"""`internimage shards index` and `verify`: list what is in a set and compare it with its manifest."""

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.durable import file_sha256
from data_pipeline.errors import BadDataError
from data_pipeline.executors.processes import available, ordered_map
from data_pipeline.format import (
    Manifest,
    ShardEntry,
    count_reasons,
    index_set,
    index_shard,
    open_set,
    packed_rows,
    read_manifest,
    read_sidecar,
    slot_rows,
)
from data_pipeline.format.sets import PENDING
from data_pipeline.format.sidecar import ERASED, PARTS
from data_pipeline.preparation.statistics import note_counts


@dataclass(frozen=True)
class IndexSummary:
    """Result of indexing foreign shards."""

    folder: Path
    manifest: Path
    shards: int
    samples: int
    rejected: Mapping[str, int]  # damage and samples without an image, by reason
    noted: Mapping[str, int]  # samples that are usable but lack something, by reason


@dataclass(frozen=True)
class Problem:
    """A difference between a set and its manifest or sidecar. `key` is empty where the whole shard differs."""

    shard: str
    key: str
    what: str


@dataclass(frozen=True)
class VerifySummary:
    """`problems` holds the first ones (`kept` of `verify`); `problem_count` counts them all."""

    folder: Path
    shards: int
    samples: int
    sound: bool
    problem_count: int
    problems: tuple[Problem, ...]


def index(
    folder: Path,
    *,
    index_folder: Path | None = None,
    force: bool = False,
    workers: int | None = 1,
    progress: ProgressCallback | None = None,
) -> IndexSummary:
    """Indexes the `*.tar` shards of `folder`: sidecars and a manifest, beside them or in `index_folder`.

    Shards that have a current index are not read again, unless `force`. workers: processes; None takes one a core.
    Raises UserError where there is nothing to index or the index cannot be written.
    """
    each = partial(ordered_map, workers=available() if workers is None else workers, chunk=1)
    found = index_set(Path(folder), Path(index_folder or folder), force=force, each=each, progress=progress)
    rejected: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    for entry in found.shards:
        rows = read_sidecar(found.sidecar_path(entry), ["status", "reason"])
        rejected.update(count_reasons(rows))
        noted.update(note_counts(rows))
    return IndexSummary(
        found.folder, found.index_folder / "manifest.json", len(found.shards), found.samples, rejected, noted
    )


def verify(
    folder: Path,
    *,
    index_folder: Path | None = None,
    decode: bool = False,
    kept: int = 100,
    workers: int | None = 1,
    progress: ProgressCallback | None = None,
) -> VerifySummary:
    """Compares every shard of a set with its manifest (size, digest) and its sidecar (members, places, digests of
    images and annotations).

    `decode` also decodes every image. workers: processes; None takes one a core. Nothing is changed. Raises UserError
    or BadDataError only where the manifest itself cannot be read; all else is a problem in the summary.
    """
    found = open_set(folder, index_folder) if index_folder is not None else read_manifest(folder)
    problems: list[Problem] = []
    if (found.index_folder / PENDING).exists():
        problems.append(Problem("", "", "a command of curation was killed half-way; run it again, which finishes it"))
    count = len(problems)
    work = partial(_first_problems, replace(found, shards=()), decode=decode, kept=kept)
    processes = min(available() if workers is None else workers, len(found.shards))
    for done, (mine, first) in enumerate(ordered_map(work, found.shards, processes, chunk=1)):
        count += mine
        problems += first[: kept - len(problems)]
        if progress is not None:
            progress(done + 1, len(found.shards))
    return VerifySummary(found.folder, len(found.shards), found.samples, count == 0, count, tuple(problems))


def _first_problems(found: Manifest, entry: ShardEntry, *, decode: bool, kept: int) -> tuple[int, list[Problem]]:
    """Counts the problems of one shard, and names the first ones."""
    first: list[Problem] = []
    count = 0
    for problem in _problems(found, entry, decode):
        count += 1
        if count <= kept:
            first.append(problem)
    return count, first


def _problems(found: Manifest, entry: ShardEntry, decode: bool) -> Iterator[Problem]:
    path = found.shard_path(entry)
    try:
        size = path.stat().st_size
    except OSError as error:
        yield Problem(entry.name, "", f"cannot be read: {error.strerror}")
        return
    if size != entry.bytes:
        yield Problem(entry.name, "", f"has {size} bytes, the manifest says {entry.bytes}")
    elif (digest := file_sha256(path)) != entry.sha256:
        yield Problem(entry.name, "", f"has sha256 {digest}, the manifest says {entry.sha256}")
    try:
        rows = read_sidecar(found.sidecar_path(entry))
    except BadDataError as error:
        yield Problem(entry.name, "", str(error))
        return
    slots = slot_rows(rows)
    if slots.num_rows != entry.samples:
        yield Problem(entry.name, "", f"sidecar has {slots.num_rows} slots, the manifest says {entry.samples}")
    erased = pc.equal(slots["status"], ERASED)
    yield from _not_erased(path, entry.name, slots.filter(erased))
    yield from _members(path, entry.name, slots.filter(pc.invert(erased)))
    if decode:
        yield from _undecodable(path, entry.name, packed_rows(rows))


def _not_erased(path: Path, shard: str, erased: pa.Table) -> Iterator[Problem]:
    """Names the erased samples that still have bytes."""
    with open(path, "rb") as file:
        for row in erased.to_pylist():
            for part in PARTS:
                if row.get(f"{part}_offset") is not None:
                    file.seek(row[f"{part}_offset"])
                    if file.read(row[f"{part}_size"]).strip(b"\0"):
                        yield Problem(shard, row["key"], f"is marked as erased, but its {part} still has bytes")


def _members(path: Path, shard: str, packed: pa.Table) -> Iterator[Problem]:
    """Compares every packed row with the archive's headers, and every sample of the archive with the rows."""
    there = {row["key"]: row for row in slot_rows(index_shard(path)).to_pylist()}
    places = [f"{part}_{what}" for part in PARTS for what in ("offset", "size")]
    for row in packed.to_pylist():
        member = there.pop(row["key"], None)
        if member is None:
            yield Problem(shard, row["key"], "stands in the sidecar, not in the shard")
        elif any(row.get(place) != member.get(place) for place in places):
            yield Problem(shard, row["key"], "lies elsewhere in the shard than the sidecar says")
        elif row["sha256"] is not None and row["sha256"] != member["sha256"]:
            yield Problem(shard, row["key"], "image has another sha256 than the sidecar says")
        elif row.get("annotation_sha256") not in (None, member.get("annotation_sha256")):
            yield Problem(shard, row["key"], "annotation has another sha256 than the sidecar says")
        elif row["caption"] != member["caption"]:
            yield Problem(shard, row["key"], "caption differs from the sidecar's")
        elif (row["width"], row["height"]) != (member["width"], member["height"]):
            yield Problem(shard, row["key"], "image has another size than the sidecar says")
    for key in there:
        yield Problem(shard, key, "stands in the shard, not in the sidecar")


def _undecodable(path: Path, shard: str, packed: pa.Table) -> Iterator[Problem]:
    with open(path, "rb") as file:
        for row in packed.select(["key", "image_offset", "image_size"]).to_pylist():
            file.seek(row["image_offset"])
            try:
                with Image.open(io.BytesIO(file.read(row["image_size"]))) as image:
                    image.load()
            except Exception as error:  # decoders raise many kinds of errors on damaged bytes; each is a finding
                yield Problem(shard, row["key"], f"image cannot be decoded: {error}")
