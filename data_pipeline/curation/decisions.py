"""Carries out decisions about rows: written down whole before the first sidecar changes, then done whatever is killed.

    SET/.curation/pending.json         in every set concerned: which of them has the decisions
                  decisions.parquet    id, status, reason: what each row becomes, in order
                  decisions.json       the sets, and the step for their histories; from here on it will be done
    SET/00000.parquet ...              rewritten one by one
    SET/00000.tar                      of erased samples the bytes are zeroed in place
    SET/manifest.json                  gets the step; then `.curation` goes

Whoever comes next to any of the sets finishes first what is written down.
"""

import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.curation.catalogue import WORK_FOLDER, Catalogue, quoted
from data_pipeline.durable import atomic_path, file_lock, file_sha256, remove_leftovers, write_durably
from data_pipeline.errors import UserError, first_ten
from data_pipeline.format import Manifest, ShardEntry, open_set, read_sidecar, ustar, write_manifest, write_sidecar
from data_pipeline.format.manifest import parse_manifest
from data_pipeline.format.sets import PENDING, keep_entry
from data_pipeline.format.sidecar import ERASED

_DECISIONS, _COMMIT = "decisions.parquet", "decisions.json"


class SetPath(NamedTuple):
    """Where a set is, as the user names it. `index_folder` has its sidecars, if not beside the shards."""

    folder: Path
    index_folder: Path | None = None


@contextmanager
def held_sets(paths: Sequence[SetPath], progress: ProgressCallback | None = None) -> Iterator[list[Manifest]]:
    """Opens sets for a decision, locked against other writers; finishes first what a killed run had decided.

    Raises UserError where another run is writing to one of them, or where one of them does not exist.
    """
    folders = [path.index_folder or path.folder for path in paths]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"a set is named twice: {', '.join(str(path.folder) for path in paths)}")
    with ExitStack() as held:
        for path in paths:
            open_set(path.folder, path.index_folder)  # indexes foreign shards; before that there is nothing to lock
        homes = [home for folder in folders if (home := _home(folder)) is not None]
        for folder in sorted({folder.resolve() for folder in (*folders, *homes)}):
            try:
                mine = held.enter_context(file_lock(folder / ".lock", wait=False))
            except OSError as error:
                raise UserError(f"{folder} cannot be written: {error.strerror}; copy the set elsewhere") from None
            if not mine:
                raise UserError(f"another run is writing to {folder}; wait for it")
            remove_leftovers(folder)
        for home in homes:
            _carry_out(home, progress)
        for folder in folders:
            shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)  # of a run that had decided nothing yet
        try:
            yield [_opened(path.folder, folder) for path, folder in zip(paths, folders, strict=True)]
        finally:
            for folder in folders:
                if not (folder / WORK_FOLDER / _COMMIT).exists():
                    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)


def open_settled(path: SetPath) -> Manifest:
    """Opens a set that is only read. Raises UserError where a killed command has left decisions half done."""
    if _home(path.index_folder or path.folder) is not None:
        raise UserError(
            f"a command of curation on {path.folder} was killed half-way; run it again, which finishes what it decided"
        )
    return open_set(path.folder, path.index_folder)


def decide(
    catalogue: Catalogue,
    select: str,
    steps: Sequence[Mapping[str, Any] | None],
    progress: ProgressCallback | None = None,
) -> None:
    """Writes down and carries out what `select` gives: id, status, reason of the rows that change.

    steps: one for the history of each set of the catalogue, None where nothing is decided. Sets must be held. Raises
    UserError, before anything counts as decided, where a tar of which samples are to be erased cannot be written.
    """
    run = catalogue.connection.execute
    home = next(one for one, step in zip(catalogue.sets, steps, strict=True) if step is not None).index_folder
    work = home / WORK_FOLDER
    work.mkdir(exist_ok=True)
    with atomic_path(work / _DECISIONS) as path:
        run(
            f"copy (select id, status, reason from ({select}) order by id) to {quoted(str(path))} "
            "(format parquet, row_group_size 100000)"
        )
        written = f"read_parquet({quoted(str(path))})"  # `select` may have taken its time over many rows
        erasing = run(f"select distinct id >> 32 from {written} where status = '{ERASED}' order by 1").fetchall()
        need_tars([catalogue.entry(sidecar << 32) for (sidecar,) in erasing], os.O_WRONLY)
    for one, step in zip(catalogue.sets, steps, strict=True):
        if step is not None:
            (one.index_folder / WORK_FOLDER).mkdir(exist_ok=True)
            write_durably(one.index_folder / PENDING, json.dumps({"home": str(home.resolve())}))
    commit = {
        "sets": [
            {
                "folder": str(one.folder.resolve()),
                "index": str(one.index_folder.resolve()),
                "revision": one.revision,
                "step": None if step is None else dict(step),
            }
            for one, step in zip(catalogue.sets, steps, strict=True)
        ]
    }
    write_durably(work / _COMMIT, json.dumps(commit, ensure_ascii=False))
    _carry_out(home, progress)


def need_tars(shards: Iterable[tuple[Manifest, ShardEntry]], mode: int = os.O_RDONLY) -> None:
    """Checks that tars can be opened in this mode. Raises UserError, as where `--tars-to` has sent them away."""
    failed = []
    for one, entry in shards:
        try:
            os.close(os.open(one.shard_path(entry), mode))
        except OSError as error:
            failed.append((one.shard_path(entry), error.strerror))
    if failed:
        path, why = failed[0]
        writing = "written" if mode == os.O_WRONLY else "read"
        names = first_ten([other.name for other, _ in failed])
        raise UserError(
            f"{path.parent}: {len(failed)} shards cannot be {writing}, where this needs their bytes ({names}: "
            f"{why}); copy those that --tars-to has sent away back into the folder, or give permission, and "
            "run the command again; then send what has changed by `internimage shards publish`"
        )


def _home(folder: Path) -> Path | None:
    """Returns where decisions about the set in `folder` are written down; None where there are none to carry out."""
    with suppress(FileNotFoundError):
        home = Path(json.loads((folder / PENDING).read_bytes())["home"])
        return home if (home / WORK_FOLDER / _COMMIT).exists() else None
    return None


def _carry_out(folder: Path, progress: ProgressCallback | None) -> None:
    """Does what is written down in `folder`, if anything is."""
    work = folder / WORK_FOLDER
    try:
        commit = json.loads((work / _COMMIT).read_bytes())
    except FileNotFoundError:
        return
    sets = [_opened(Path(said["folder"]), Path(said["index"])) for said in commit["sets"]]
    shards = [(number, shard) for number, one in enumerate(sets) for shard in range(len(one.shards))]
    entries = [list(one.shards) for one in sets]
    for sidecar, rows in groupby(_written_down(work / _DECISIONS), key=lambda row: row[0] >> 32):
        number, shard = shards[sidecar]
        changes = {row_id & 0xFFFFFFFF: (status, reason) for row_id, status, reason in rows}
        entries[number][shard] = _change(sets[number], entries[number][shard], changes)
        if progress is not None:
            progress(sidecar + 1, len(shards))
    for one, said, now in zip(sets, commit["sets"], entries, strict=True):
        if said["step"] is not None and one.revision == said["revision"]:
            history = [*one.history, said["step"]]
            write_manifest(
                one.index_folder, name=one.name, shards=now, classes=one.classes, about=one.about, history=history
            )
    (work / _COMMIT).unlink()
    for one in sets:
        (one.index_folder / PENDING).unlink(missing_ok=True)
    (work / _DECISIONS).unlink()


def _written_down(path: Path) -> Iterator[tuple[int, str, str]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=65536):
            yield from zip(*(batch[name].to_pylist() for name in ("id", "status", "reason")), strict=True)


def _change(one: Manifest, entry: ShardEntry, changes: Mapping[int, tuple[str, str]]) -> ShardEntry:
    """Gives rows of a shard, by place, their new status and reason; returns the shard's entry, new where bytes went."""
    erased = [place for place, (status, _) in changes.items() if status == ERASED]
    if erased:  # a tar may have gone since the decision: the sidecar must not claim what then fails
        need_tars([(one, entry)], os.O_WRONLY)
    path = one.sidecar_path(entry)
    rows = read_sidecar(path)
    metadata = rows.schema.metadata
    statuses, reasons = rows["status"].to_pylist(), rows["reason"].to_pylist()
    captions = rows["caption"].to_pylist()
    for place, (status, reason) in changes.items():
        statuses[place], reasons[place] = status, reason
        if status == ERASED:
            captions[place] = None
    for name, values in (("status", statuses), ("reason", reasons), ("caption", captions)):
        index = rows.column_names.index(name)
        rows = rows.set_column(index, rows.schema.field(name), pa.array(values, pa.string()))
    write_sidecar(path, rows.replace_schema_metadata(metadata))
    if not erased:
        return entry
    _zero(one.shard_path(entry), rows.take(erased))
    changed = replace(entry, sha256=file_sha256(one.shard_path(entry)), laid_out=entry.slots)
    keep_entry(one, changed)
    return changed


def _zero(tar: Path, rows: pa.Table) -> None:
    """Overwrites all members of samples with zeros, where they lie, so that no other byte moves."""
    keys = set(rows["key"].to_pylist())
    with open(tar, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        for member in list(ustar.walk(data)):
            if isinstance(member, ustar.TarMember) and ustar.sample_name(member.name)[0] in keys:
                data[member.offset : member.offset + member.size] = bytes(member.size)
        data.flush()
        os.fsync(file.fileno())


def _opened(folder: Path, index: Path) -> Manifest:
    """Reads the manifest as it is. Nothing is indexed here: half an erasure must not look like a changed shard."""
    with suppress(FileNotFoundError):
        return parse_manifest((index / "manifest.json").read_bytes(), folder, where=str(index), index_folder=index)
    raise UserError(f"{index / 'manifest.json'} is gone, though decisions about the set are written down; restore it")
