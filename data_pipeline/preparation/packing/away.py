"""Shards that go to object storage one by one; their folder keeps what is small, and goes on as if they were there.

URL/00000.tar, 00000.parquet, 00000_stats.json
    00000.published.json    digests of these, written behind them: the shard is there
FOLDER/00000.parquet, 00000_stats.json
    00000.away              in place of the tar: the digest of the tar that lies at the URL

`publishing` completes the set at the URL by its manifest.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import fsspec

from data_pipeline.durable import file_sha256, write_durably
from data_pipeline.errors import UserError
from data_pipeline.format import ShardEntry
from data_pipeline.format.manifest import AWAY
from data_pipeline.format.sets import PUBLISHED
from data_pipeline.preparation.packing.samples import is_away


class Storage(Protocol):
    """What is needed of an fsspec file system."""

    def put_file(self, lpath: str, rpath: str) -> object: ...
    def get_file(self, rpath: str, lpath: str) -> object: ...
    def cat_file(self, path: str) -> bytes: ...
    def pipe_file(self, path: str, value: bytes) -> object: ...
    def exists(self, path: str) -> bool: ...
    def rm_file(self, path: str) -> object: ...
    def makedirs(self, path: str, exist_ok: bool) -> object: ...


@contextmanager
def opened_storage(url: str, doing: str = "written") -> Iterator[tuple[Storage, str]]:
    """Yields the file system of a URL and the path there. Raises UserError for whatever fails in the block but a
    UserError: each file system raises errors of its own."""
    try:
        found, root = fsspec.core.url_to_fs(url.rstrip("/"))
        storage: Storage = found
        yield storage, root
    except UserError:
        raise
    except Exception as error:
        said = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{url} cannot be {doing} ({said}); check the URL and credentials") from None


@dataclass(frozen=True)
class Away:
    """Where the tars of a run go; picklable."""

    url: str

    def send(self, folder: Path, entry: ShardEntry) -> None:
        """Copies a finished shard, then deletes its tar in `folder`; does the rest of it where a killed run has begun.
        Raises UserError where the URL cannot be written."""
        tar, note = folder / entry.name, (folder / entry.name).with_suffix(AWAY)
        if not is_away(folder, entry):
            with opened_storage(self.url) as (storage, root):
                storage.makedirs(root, exist_ok=True)
                send_shard(folder, entry, storage, root)
            write_durably(note, entry.sha256)
        tar.unlink(missing_ok=True)

    def bring_back(self, folder: Path, entry: ShardEntry) -> None:
        """Copies a tar back, to be read once more. Raises UserError where it cannot be read, or is another one."""
        tar = folder / entry.name
        if tar.exists() or not is_away(folder, entry):
            return
        with opened_storage(self.url, "read") as (storage, root):
            storage.get_file(f"{root}/{entry.name}", str(tar))
            if file_sha256(tar) != entry.sha256:
                tar.unlink()
                raise UserError(f"{self.url}/{entry.name} is not the shard that was written; restore it")


def send_shard(folder: Path, entry: ShardEntry, storage: Storage, root: str) -> int:
    """Copies those files of a shard that are not there by their digests; returns how many bytes that took."""
    files = _files(folder, entry)
    mark = f"{root}/{Path(entry.name).stem}{PUBLISHED}"
    there = _said(storage, mark)
    due = [name for name, digest in files.items() if there.get(name) != digest]
    if not due:
        return 0
    kept = {name: digest for name, digest in files.items() if name not in due}
    if there:  # what is about to change is no longer vouched for
        storage.pipe_file(mark, json.dumps(kept, sort_keys=True).encode())
    for name in due:
        storage.put_file(str(folder / name), f"{root}/{name}")
    storage.pipe_file(mark, json.dumps(files, sort_keys=True).encode())
    return sum((folder / name).stat().st_size for name in due)


def _said(storage: Storage, mark: str) -> Mapping[str, str]:
    if not storage.exists(mark):
        return {}
    try:
        said = json.loads(storage.cat_file(mark))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _files(folder: Path, entry: ShardEntry) -> dict[str, str]:
    """Lists the files of a shard with their digests; the tar last: alone it would be taken for a foreign shard."""
    beside = (f"{Path(entry.name).stem}_stats.json", entry.sidecar)
    found = {name: file_sha256(folder / name) for name in beside if (folder / name).exists()}
    return found | {entry.name: entry.sha256}
