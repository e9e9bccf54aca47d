"""`internimage shards publish`: copies a set to object storage, so that a broken copy is never taken for a set.

URL/00000.tar, 00000.parquet, 00000_stats.json
    00000.published.json    digests of these three, written behind them: the shard is there
    manifest.json           removed before anything changes, written last
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import fsspec

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.curation.decisions import SetPath, open_settled
from data_pipeline.durable import file_sha256
from data_pipeline.errors import StoppedError, UserError
from data_pipeline.executors.units import stop_requests
from data_pipeline.format import Manifest, ShardEntry
from data_pipeline.format.manifest import SET_MANIFEST
from data_pipeline.format.sets import SHARD_INDEX_SUFFIX

_MARK = ".published.json"
_BESIDE = ("sizes.json", "plan.json")


class _Remote(Protocol):
    """What is needed of an fsspec file system."""

    def put_file(self, lpath: str, rpath: str) -> object: ...
    def cat_file(self, path: str) -> bytes: ...
    def pipe_file(self, path: str, value: bytes) -> object: ...
    def exists(self, path: str) -> bool: ...
    def rm_file(self, path: str) -> object: ...
    def makedirs(self, path: str, exist_ok: bool) -> object: ...


@dataclass(frozen=True)
class PublishSummary:
    """copied: shards that were not there, or were other ones."""

    url: str
    shards: int
    copied: int
    bytes: int


def publish(
    path: SetPath, url: str, *, connections: int = 8, progress: ProgressCallback | None = None
) -> PublishSummary:
    """Copies the set to `url` (any fsspec URL); shards that are there already, by digest, are left alone.

    A killed or stopped run goes on there. Raises UserError for a set whose index lies elsewhere, and for a URL that
    cannot be written; StoppedError after SIGUSR1 or SIGTERM.
    """
    one = open_settled(path)
    if any(entry.sidecar.endswith(SHARD_INDEX_SUFFIX) for entry in one.shards):
        raise UserError(f"{one.folder} is a foreign set with an index; write it anew first: internimage shards reshard")
    try:
        found, root = fsspec.core.url_to_fs(url.rstrip("/"))
        remote: _Remote = found
        remote.makedirs(root, exist_ok=True)
        return _publish(one, remote, root, url, connections, progress)
    except (UserError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{url} cannot be written: {error}; check the URL and credentials") from None
    except Exception as error:  # each file system raises errors of its own
        raise UserError(
            f"{url} cannot be written ({type(error).__name__}: {error}); check the URL and credentials"
        ) from None


def _publish(
    one: Manifest, remote: _Remote, root: str, url: str, connections: int, progress: ProgressCallback | None
) -> PublishSummary:
    text = (one.index_folder / SET_MANIFEST).read_bytes()
    manifest = f"{root}/{SET_MANIFEST}"
    if remote.exists(manifest):
        if remote.cat_file(manifest) == text:
            return PublishSummary(url, len(one.shards), 0, 0)
        remote.rm_file(manifest)
    copied = size = 0
    with stop_requests() as stopping, ThreadPoolExecutor(connections) as threads:

        def copy(entry: ShardEntry) -> int:
            return 0 if stopping() else _copy(one, entry, remote, root)

        for done, count in enumerate(threads.map(copy, one.shards)):
            copied += count > 0
            size += count
            if progress is not None:
                progress(done + 1, len(one.shards))
        if stopping():
            raise StoppedError(f"stopped behind the shards under way, as asked; the same command goes on at {url}")
    for name in _BESIDE:
        if (one.folder / name).exists():
            remote.pipe_file(f"{root}/{name}", (one.folder / name).read_bytes())
    remote.pipe_file(manifest, text)
    return PublishSummary(url, len(one.shards), copied, size)


def _copy(one: Manifest, entry: ShardEntry, remote: _Remote, root: str) -> int:
    """Copies the files of a shard unless they are there; returns how many bytes that took."""
    files = dict(_files(one, entry))
    mark = f"{root}/{Path(entry.name).stem}{_MARK}"
    said = json.dumps(files, sort_keys=True).encode()
    if remote.exists(mark):
        if remote.cat_file(mark) == said:
            return 0
        remote.rm_file(mark)
    for name in files:
        remote.put_file(str(one.folder / name), f"{root}/{name}")
    remote.pipe_file(mark, said)
    return sum((one.folder / name).stat().st_size for name in files)


def _files(one: Manifest, entry: ShardEntry) -> Iterator[tuple[str, str]]:
    yield entry.name, entry.sha256
    statistics = f"{Path(entry.name).stem}_stats.json"
    for name in (entry.sidecar, statistics):
        if (one.folder / name).exists():
            yield name, file_sha256(one.folder / name)
