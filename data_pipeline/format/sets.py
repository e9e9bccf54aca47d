"""Opens a set: by its manifest, or, where somebody else made the shards, by indexing them once."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.callbacks import Heartbeat, ProgressCallback
from data_pipeline.durable import file_lock, file_sha256, write_durably
from data_pipeline.errors import BadDataError, UserError
from data_pipeline.format import sidecar
from data_pipeline.format.index import index_shard
from data_pipeline.format.manifest import (
    COMMIT,
    FORMER,
    SET_MANIFEST,
    Manifest,
    ShardEntry,
    parse_manifest,
    read_manifest,
    write_manifest,
)

# img2dataset puts a Parquet file of its own beside a shard, 00000.parquet; an index must not take its name.
SHARD_INDEX_SUFFIX = ".index.parquet"
# There while decisions about a set are being carried out: half an erasure must not look like a changed shard.
PENDING = Path(".curation/pending.json")
PUBLISHED = ".published.json"  # 00000.published.json: behind a shard on object storage, digests of its files
_ABOUT = b"internimage.shard"  # in the metadata of an index: its manifest entry, kept before there is a manifest

Indexed = tuple[ShardEntry, dict[int, str]]  # a shard's entry, and the names of its labels
ShardMap = Callable[[Callable[[Path], Indexed], Iterable[Path]], Iterator[Indexed]]


def open_set(
    folder: Path | str, index_folder: Path | str | None = None, *, heartbeat: Heartbeat | None = None
) -> Manifest:
    """Opens the set in `folder`: its manifest if it has one, else its `*.tar` shards, indexed on first use.

    The index of foreign shards goes to `index_folder` (default: beside the shards), unless a current one lies beside
    them. It is made once: processes that come at the same time wait for the first, and one that was killed goes on
    where it was. A shard that changed since (other size, or newer and of another digest) is indexed again.
    `heartbeat` is called while that takes time, for every shard and every moment of waiting.

    Raises UserError for a missing or empty folder, one that cannot take the index, or a set of this program's that is
    not finished.
    """
    folder = Path(folder)
    for place in (folder if index_folder is None else Path(index_folder), folder):
        if (place / PENDING).exists():
            return _read(folder, place)
    if (folder / SET_MANIFEST).exists():
        found = read_manifest(folder)
        if not any(entry.sidecar.endswith(SHARD_INDEX_SUFFIX) for entry in found.shards):
            return found  # this program packed the set: only `shards index --force` may change it
        if index_folder is not None and _covers(found, _shards(folder)):
            return found
    return index_set(folder, folder if index_folder is None else Path(index_folder), heartbeat=heartbeat)


def index_set(
    folder: Path,
    index_folder: Path,
    *,
    force: bool = False,
    each: ShardMap = map,
    progress: ProgressCallback | None = None,
    heartbeat: Heartbeat | None = None,
) -> Manifest:
    """Indexes every `*.tar` of `folder` that has no current index in `index_folder`, and writes the manifest there.

    Classes are numbered as before; labels that are new (the set grew) extend them. `each` maps over
    the shards in their order: in this process, or in several. Raises UserError as `open_set` does; `force` takes an
    unfinished set's shards as foreign ones.
    """
    folder, index_folder = Path(folder), Path(index_folder)
    if not folder.is_dir():
        raise UserError(f"shard folder {folder} does not exist; check the path")
    if not force and not (index_folder / SET_MANIFEST).exists() and _unfinished(folder):
        raise unfinished_set(str(folder))
    shards = _shards(folder)
    if not shards:
        raise UserError(f"folder {folder} holds no manifest.json and no .tar shard; check the path")
    former = None if force else _former(folder, index_folder)
    if former is not None and _covers(former, shards):
        return former  # takes no lock: an indexed set must open from a read-only disk
    try:
        index_folder.mkdir(parents=True, exist_ok=True)
        with file_lock(index_folder / ".index.lock", heartbeat=heartbeat):
            return _index(folder, index_folder, shards, force, each, progress, heartbeat)
    except OSError as error:
        raise UserError(
            f"the index of {folder} cannot be written to {index_folder} ({error.strerror}); "
            "give another index folder that can be written"
        ) from None


def write_index(
    path: Path, shard: str, rows: pa.Table, size: int, digest: str, names: dict[int, str], *, laid_out: str = ""
) -> ShardEntry:
    """Writes the index of one shard with all that the manifest will say of it, so that work done is never done again.

    `names`: those of its labels. Returns the entry; `kept_entry` gives both back.
    """
    entry = ShardEntry(shard, path.name, sidecar.slot_rows(rows).num_rows, size, digest, laid_out)
    about = json.dumps({"entry": entry.as_json(), "names": names}).encode()
    sidecar.write_sidecar(path, rows.replace_schema_metadata({_ABOUT: about}))
    return entry


def kept_entry(path: Path) -> tuple[ShardEntry, dict[int, str]] | None:
    """Returns what `write_index` was given; None where there is no such file, or some other file."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # pyarrow's own errors are ValueErrors and OSErrors
        about = json.loads((pq.read_schema(path).metadata or {})[_ABOUT])
        return ShardEntry(**about["entry"]), {int(label): str(name) for label, name in about["names"].items()}
    return None


def keep_entry(one: Manifest, entry: ShardEntry) -> None:
    """Puts a changed entry where the writer of the shard keeps it besides the manifest: in its statistics or index."""
    path = one.sidecar_path(entry)
    kept = kept_entry(path)
    if kept is not None:
        about = json.dumps({"entry": entry.as_json(), "names": kept[1]}).encode()
        sidecar.write_sidecar(path, sidecar.read_sidecar(path).replace_schema_metadata({_ABOUT: about}))
    statistics = path.with_name(f"{path.stem}_stats.json")
    with suppress(FileNotFoundError):
        if is_own_statistics(said := statistics.read_bytes()):
            content = json.loads(said) | {"shard": entry.as_json()}
            write_durably(statistics, (json.dumps(content, indent=1) + "\n").encode())


def unfinished_set(where: str) -> UserError:
    """Makes the error for shards of this program's without a manifest: their sidecars hold decisions about samples,
    of which an index, made from the tars alone, knows nothing."""
    return UserError(
        f"{where} holds an unfinished set: shards that this program wrote, and no {SET_MANIFEST}; run the command that "
        "writes it (pack, fetch, reshard, publish, ...) once more, which completes it"
    )


def is_own_statistics(content: bytes) -> bool:
    """Tells the statistics of a shard that this program wrote from img2dataset's, which have the same file name."""
    with suppress(ValueError):
        said = json.loads(content)
        return isinstance(said, dict) and "shard" in said
    return False


def _unfinished(folder: Path) -> bool:
    """Tells whether this program is writing, or was killed while it wrote, the set in `folder`."""
    if (folder / SET_MANIFEST).exists():
        return False
    if (folder / FORMER).exists() or any(folder.glob("*" + COMMIT)):
        return True
    return any(is_own_statistics(path.read_bytes()) for path in folder.glob("*_stats.json"))


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if path.is_file())


def _index(
    folder: Path,
    index_folder: Path,
    shards: list[Path],
    force: bool,
    each: ShardMap,
    progress: ProgressCallback | None,
    heartbeat: Heartbeat | None,
) -> Manifest:
    former = _former(folder, index_folder)
    known = {} if former is None else {entry.name: entry for entry in former.shards}
    entries = []
    names: dict[int, str] = {}
    work = partial(_indexed, index_folder=index_folder, known={} if force else known, force=force)
    for done, (entry, mine) in enumerate(each(work, shards)):
        entries.append(entry)
        names = mine | names
        if progress is not None:
            progress(done + 1, len(shards))
        if heartbeat is not None:
            heartbeat()
    if force or entries != list(known.values()):
        classes = joined_classes(None if former is None else former.classes, names)
        name, about = (folder.resolve().name, None) if former is None else (former.name, former.about)
        write_manifest(index_folder, name=name, shards=entries, classes=classes, about=about)
    return _read(folder, index_folder)


def _indexed(path: Path, *, index_folder: Path, known: dict[str, ShardEntry], force: bool) -> Indexed:
    """Indexes one shard, unless its index is current; returns its entry and the names of its labels."""
    index = index_folder / (path.stem + SHARD_INDEX_SUFFIX)
    entry = known.get(path.name)
    names: dict[int, str] = {}
    if not force and entry is None and (kept := kept_entry(index)) is not None and kept[0].name == path.name:
        entry, names = kept
    if entry is not None and _current(entry, path, index_folder / entry.sidecar):
        return entry, names
    rows, laid_out = index_shard(path), ""
    for former in (index, path.with_suffix(".parquet")):  # the latter where this program packed the shard
        with suppress(BadDataError):  # there is none, or none that can be read
            rows = sidecar.carry_decisions(sidecar.read_sidecar(former), rows)
            break
    if (kept := kept_entry(index)) is not None and sidecar.ERASED in rows["status"].to_pylist():
        laid_out = kept[0].slots  # zeroed bytes move no slot
    names = label_names(path, sidecar.packed_rows(rows))
    entry = write_index(index, path.name, rows, path.stat().st_size, file_sha256(path), names, laid_out=laid_out)
    return entry, names


def joined_classes(former: Sequence[str] | None, names: Mapping[int, str]) -> tuple[str, ...] | None:
    """Returns the classes of a set whose labels have these names, numbered as before where they were; None for none.

    A number without a name goes by its digits, until a shard names it.
    """
    found = dict(names)
    found |= {label: name for label, name in enumerate(former or ()) if name != str(label) or label not in found}
    return tuple(found.get(label, str(label)) for label in range(max(found) + 1)) if found else None


def _former(folder: Path, index_folder: Path) -> Manifest | None:
    """Reads an earlier index; None where there is none, or none that can be read."""
    try:
        return _read(folder, index_folder)
    except (UserError, OSError):
        return None


def _covers(former: Manifest, shards: list[Path]) -> bool:
    """Tells whether an earlier index describes exactly these shards as they are now."""
    return [path.name for path in shards] == [entry.name for entry in former.shards] and all(
        _current(entry, former.shard_path(entry), former.sidecar_path(entry)) for entry in former.shards
    )


def label_names(shard: Path, packed: pa.Table) -> dict[int, str]:
    """Reads the name of each label from the JSON of one sample: shards outlive their manifest.

    A label that stands in a `.cls` member alone, or whose JSON names none, goes by its digits.
    """
    found: dict[int, str] = {}
    with open(shard, "rb") as file:
        for row in packed.select(["label", "json_offset", "json_size"]).to_pylist():
            label = row["label"]
            if label is None or label in found:
                continue
            found[label] = str(label)
            if row["json_offset"] is not None:
                file.seek(row["json_offset"])
                with suppress(ValueError, AttributeError):
                    name = json.loads(file.read(row["json_size"])).get("label_name")
                    found[label] = name if isinstance(name, str) else str(label)
    return found


def _read(folder: Path, index_folder: Path) -> Manifest:
    path = index_folder / SET_MANIFEST
    return parse_manifest(path.read_bytes(), folder, where=str(path), index_folder=index_folder)


def _current(entry: ShardEntry, shard: Path, index: Path) -> bool:
    """Tells whether `index` still describes `shard`; computes the digest only where the shard is the newer file."""
    try:
        if entry.bytes != shard.stat().st_size:
            return False
        return index.stat().st_mtime_ns > shard.stat().st_mtime_ns or entry.sha256 == file_sha256(shard)
    except OSError:
        return False
