"""Opens sets behind fsspec URLs: manifest or index, shards through the node's cache, fetched ahead of need."""

import hashlib
import os
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipeline.callbacks import Heartbeat
from data_pipeline.durable import file_lock, file_sha256
from data_pipeline.errors import UserError
from data_pipeline.format import Manifest, ShardEntry, index_shard, packed_rows, read_manifest, write_manifest
from data_pipeline.format.manifest import SET_MANIFEST, parse_manifest
from data_pipeline.format.sets import (
    PUBLISHED,
    SHARD_INDEX_SUFFIX,
    is_own_statistics,
    joined_classes,
    kept_entry,
    label_names,
    unfinished_set,
    write_index,
)
from data_pipeline.reading.config import CacheConfig
from data_pipeline.reading.decode.pixels import BadSample
from data_pipeline.reading.order.samples import SourceOrder
from data_pipeline.reading.storage.cache import FetchError, FileCache

_THREADS = 4


def is_remote(path: str) -> bool:
    """Tells whether `path` is an fsspec URL (`s3://...`, `https://...`, `memory://...`)."""
    return "://" in path


def cache_folder(config: CacheConfig) -> Path:
    """Returns where copies go: the configured folder, else this user's in the system's temporary folder."""
    return Path(config.folder) if config.folder else Path(tempfile.gettempdir()) / f"internimage-cache-{os.getuid()}"


def node_index_folder(path: str, config: CacheConfig) -> Path:
    """Returns where this node keeps the index of a set without one, for all runs that read the set."""
    return cache_folder(config) / "sets" / hashlib.sha256(path.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class RemoteFiles:
    """Opens the files of one remote set through the cache."""

    url: str
    manifest: Manifest
    cache: FileCache

    def shard(self, entry: ShardEntry) -> int:
        """Opens a whole, checked copy. Raises BadSample."""
        return self.cache.open(f"{self.url}/{entry.name}", sha256=entry.sha256, size=entry.bytes)

    def sidecar(self, entry: ShardEntry) -> BinaryIO:
        """Opens the Parquet file. Raises BadSample."""
        if entry.sidecar.endswith(SHARD_INDEX_SUFFIX):
            return open(self.manifest.sidecar_path(entry), "rb")
        try:
            return os.fdopen(self.cache.open(f"{self.url}/{entry.sidecar}", version=self._version(entry)), "rb")
        except FetchError as error:
            raise BadSample("sidecar_unreadable", error.detail) from None

    def fetch(self, entry: ShardEntry) -> None:
        """Fetches sidecar and shard, unless another process is fetching them. Raises FetchError."""
        if not entry.sidecar.endswith(SHARD_INDEX_SUFFIX):
            self.cache.fetch(f"{self.url}/{entry.sidecar}", version=self._version(entry), wait=False)
        self.cache.fetch(f"{self.url}/{entry.name}", sha256=entry.sha256, size=entry.bytes, wait=False)

    def _version(self, entry: ShardEntry) -> str:
        """Tells copies of a sidecar apart, which changes with decisions about its rows."""
        return entry.sha256 + self.manifest.revision


def open_remote(url: str, config: CacheConfig, *, heartbeat: Heartbeat | None = None) -> RemoteFiles:
    """Opens the set at `url`: by its manifest, else by indexing its shards, once a node (`heartbeat` is
    called for each). Raises UserError where there is neither, where a copy is unfinished, or the URL out of reach."""
    url = url.rstrip("/")
    root = cache_folder(config)
    cache = FileCache(root / "files", int(config.size_gb * 1e9))
    own = node_index_folder(url, config)
    own.mkdir(parents=True, exist_ok=True)
    try:
        system, path = cache.system(url)
        if system.exists(f"{path}/{SET_MANIFEST}"):
            manifest = parse_manifest(system.cat_file(f"{path}/{SET_MANIFEST}"), own, where=f"{url}/{SET_MANIFEST}")
        else:
            manifest = _index(url, own, cache, heartbeat)
    except (UserError, FetchError):
        raise
    except Exception as error:  # each file system raises errors of its own
        raise UserError(
            f"{url} cannot be read ({type(error).__name__}: {error}); check the URL and credentials"
        ) from None
    return RemoteFiles(url, manifest, cache)


def cache_shares(sets: Sequence[RemoteFiles], config: CacheConfig, block_shards: int) -> list[int]:
    """Returns how many bytes each set may fetch ahead: four fifths of the cache, shared in proportion to their blocks.

    Raises UserError where the cache does not hold a block of each.
    """
    sizes = [sorted((shard.bytes for shard in one.manifest.shards), reverse=True) for one in sets]
    blocks = [sum(largest[:block_shards]) for largest in sizes]
    size = int(config.size_gb * 1e9)
    if sum(blocks) > size:
        urls = " and ".join(one.url for one in sets)
        raise UserError(
            f"data.cache.size_gb {config.size_gb:g} does not hold a block of {urls} ({sum(blocks) / 1e9:.1f} GB in "
            f"{block_shards} shards each): raise it, or lower data.block_shards"
        )
    return [int(0.8 * size * block / max(1, sum(blocks))) for block in blocks]


def _index(url: str, own: Path, cache: FileCache, heartbeat: Heartbeat | None) -> Manifest:
    """Indexes the `*.tar` of `url`; sidecars and manifest stay in `own`."""
    system, path = cache.system(url)
    there = sorted(name.rpartition("/")[2] for name in system.ls(path, detail=False))
    statistics = next((name for name in there if name.endswith("_stats.json")), None)  # one writer wrote them all
    if any(name.endswith(PUBLISHED) for name in there) or (
        statistics is not None and is_own_statistics(system.cat_file(f"{path}/{statistics}"))
    ):
        raise unfinished_set(url)
    names = [name for name in there if name.endswith(".tar")]
    if not names:
        raise UserError(f"{url} holds no {SET_MANIFEST} and no .tar shard; check the URL")
    sizes = system.sizes([f"{path}/{name}" for name in names])
    with file_lock(own / ".index.lock", heartbeat=heartbeat):
        former = read_manifest(own) if (own / SET_MANIFEST).exists() else None
        entries = []
        labels: dict[int, str] = {}
        for name, size in zip(names, sizes, strict=True):
            index = own / (Path(name).stem + SHARD_INDEX_SUFFIX)
            entry, mine = _index_shard(f"{url}/{name}", index, size, cache)
            entries.append(entry)
            labels = mine | labels
            if heartbeat is not None:
                heartbeat()
        classes = joined_classes(None if former is None else former.classes, labels)
        if former is not None and (tuple(entries), classes) == (former.shards, former.classes):
            return former
        return write_manifest(own, name=url.rpartition("/")[2] or "remote", shards=entries, classes=classes)


def _index_shard(url: str, index: Path, size: int | None, cache: FileCache) -> tuple[ShardEntry, dict[int, str]]:
    """Returns one shard's entry and the names of its labels: the kept ones, unless the shard has another size now."""
    name, version = url.rpartition("/")[2], str(size)
    kept = kept_entry(index)
    if kept is not None and kept[0].name == name and size in (None, kept[0].bytes):
        return kept
    file = cache.open(url, version=version)
    try:
        copy = Path(f"/dev/fd/{file}")  # by descriptor: others may evict the name
        digest = file_sha256(copy)
        rows = index_shard(copy)
        labels = label_names(copy, packed_rows(rows))
        entry = write_index(index, name, rows, os.fstat(file).st_size, digest, labels)
    finally:
        os.close(file)
    cache.rename(url, version, digest)
    return entry, labels


class ShardPrefetcher:
    """Threads that fetch the shards and sidecars of the block being read and of those after it, before they are needed:
    two blocks, if they fit into `budget` bytes."""

    def __init__(self, files: RemoteFiles, order: SourceOrder, index: int, budget: int) -> None:
        self._files, self._order = files, order
        shards = files.manifest.shards
        mean = max(1, sum(shard.bytes for shard in shards) // len(shards))
        self._count = max(1, min(2 * order.block_shards, budget // mean))
        self._index = index
        self._wake = threading.Condition()
        self._ended = False
        self._threads = [threading.Thread(target=self._run, daemon=True, name="shards-ahead") for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def advance(self, index: int) -> None:
        """Tells the threads that reading has come to running index `index` of the source."""
        with self._wake:
            self._index = index
            self._wake.notify_all()

    def close(self) -> None:
        with self._wake:
            self._ended = True
            self._wake.notify_all()

    def _run(self) -> None:
        done = -1
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._ended or self._index != done)  # noqa: B023 - read at once
                if self._ended:
                    return
                done = self._index
                coming = self._order.coming_shards(done, self._count)
            for number in coming:
                if self._ended:
                    return
                with suppress(FetchError, OSError):  # the reader records the fault when it needs the shard
                    self._files.fetch(self._files.manifest.shards[number])
