"""Sets behind fsspec URLs: their manifest or index, their shards through the node's cache, fetched ahead of need."""

import fcntl
import hashlib
import os
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import UserError
from data_pipeline.format import (
    Manifest,
    ShardEntry,
    index_shard,
    packed_rows,
    read_manifest,
    write_manifest,
    write_sidecar,
)
from data_pipeline.format.manifest import NAME, parse_manifest
from data_pipeline.format.sets import INDEX_SUFFIX, file_digest
from data_pipeline.reading.cache import FetchError, FileCache
from data_pipeline.reading.config import CacheConfig
from data_pipeline.reading.decode import BadSample
from data_pipeline.reading.order import SourceOrder

_THREADS = 4


def is_remote(path: str) -> bool:
    """Whether `path` is an fsspec URL (`s3://...`, `https://...`, `memory://...`)."""
    return "://" in path


def cache_folder(config: CacheConfig) -> Path:
    """Where copies go: the configured folder, else one of this user in the system's temporary folder."""
    return Path(config.folder) if config.folder else Path(tempfile.gettempdir()) / f"internimage-cache-{os.getuid()}"


@dataclass(frozen=True)
class RemoteFiles:
    """Opens the files of one remote set through the cache."""

    url: str
    manifest: Manifest
    cache: FileCache

    def shard(self, entry: ShardEntry) -> int:
        """Descriptor of a whole, checked copy. Raises BadSample."""
        try:
            return self.cache.open(f"{self.url}/{entry.name}", sha256=entry.sha256, size=entry.bytes)
        except FetchError as error:
            raise BadSample(error.reason, str(error)) from None

    def sidecar(self, entry: ShardEntry) -> BinaryIO:
        """The Parquet file. Raises BadSample."""
        if entry.sidecar.endswith(INDEX_SUFFIX):
            return open(self.manifest.sidecar_path(entry), "rb")
        try:
            return os.fdopen(self.cache.open(f"{self.url}/{entry.sidecar}", version=entry.sha256), "rb")
        except FetchError as error:
            raise BadSample("sidecar_unreadable", str(error)) from None


def open_remote(url: str, config: CacheConfig, block_shards: int) -> RemoteFiles:
    """The set at `url`: by its manifest, or, where it has none, by indexing its shards, once a node.

    Raises UserError where there is neither, where it cannot be reached, or where the cache does not hold a block.
    """
    url = url.rstrip("/")
    root = cache_folder(config)
    cache = FileCache(root / "files", int(config.size_gb * 1e9))
    own = root / "sets" / hashlib.sha256(url.encode()).hexdigest()[:24]
    own.mkdir(parents=True, exist_ok=True)
    try:
        system, path = cache.system(url)
        if system.exists(f"{path}/{NAME}"):
            manifest = parse_manifest(system.cat_file(f"{path}/{NAME}"), own, where=f"{url}/{NAME}")
        else:
            manifest = _index(url, own, cache)
    except (UserError, FetchError):
        raise
    except Exception as error:  # each file system raises errors of its own
        raise UserError(
            f"{url} cannot be read ({type(error).__name__}: {error}); check the URL and credentials"
        ) from None
    block = sum(sorted((shard.bytes for shard in manifest.shards), reverse=True)[:block_shards])
    if block > cache.size_bytes:
        raise UserError(
            f"data.cache.size_gb {config.size_gb:g} does not hold a block of {url} ({block / 1e9:.1f} GB in "
            f"{block_shards} shards): raise it, or lower data.block_shards"
        )
    return RemoteFiles(url, manifest, cache)


def _index(url: str, own: Path, cache: FileCache) -> Manifest:
    """Indexes the `*.tar` of `url`; sidecars and manifest stay in `own`. Labels without names are left out."""
    system, path = cache.system(url)
    names = sorted(name.rpartition("/")[2] for name in system.ls(path, detail=False) if name.endswith(".tar"))
    if not names:
        raise UserError(f"{url} holds no {NAME} and no .tar shard; check the URL")
    with open(own / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (own / NAME).exists():
            manifest = read_manifest(own)
            if [shard.name for shard in manifest.shards] == names:
                return manifest
        entries = []
        for name in names:
            version = str(system.size(f"{path}/{name}"))
            file = cache.open(f"{url}/{name}", version=version)
            try:
                copy = Path(f"/dev/fd/{file}")  # by descriptor: others may evict the name
                rows = index_shard(copy)
                entry = ShardEntry(
                    name,
                    Path(name).stem + INDEX_SUFFIX,
                    packed_rows(rows).num_rows,
                    os.fstat(file).st_size,
                    file_digest(copy),
                )
            finally:
                os.close(file)
            write_sidecar(own / entry.sidecar, rows)
            entries.append(entry)
        return write_manifest(own, name=url.rpartition("/")[2] or "remote", shards=entries)


class Ahead:
    """Threads that fetch the shards of the block being read and of those after it, before they are needed."""

    def __init__(self, files: RemoteFiles, order: SourceOrder, index: int) -> None:
        self._files, self._order = files, order
        shards = files.manifest.shards
        mean = max(1, sum(shard.bytes for shard in shards) // len(shards))
        self._count = max(1, min(2 * order.block_shards, int(0.8 * files.cache.size_bytes) // mean))
        self._index = index
        self._wake = threading.Condition()
        self._ended = False
        self._threads = [threading.Thread(target=self._run, daemon=True, name="shards-ahead") for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def advance(self, index: int) -> None:
        """Reading has come to running index `index` of the source."""
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
                entry = self._files.manifest.shards[number]
                with suppress(FetchError, OSError):  # whoever needs the shard will say what is wrong
                    self._files.cache.fetch(
                        f"{self._files.url}/{entry.name}", sha256=entry.sha256, size=entry.bytes, wait=False
                    )
