"""Node-local copies of remote files (any fsspec URL), bounded, shared by all processes of a node.

    FOLDER/<hash of URL and digest>-00017.tar     a whole, checked copy; its modification time is its last use
           .<name>.<pid>.partial                  one being fetched: fsync and rename make it whole
           .lock-00 ... .lock-63                  flock: one fetch of a file at a time, freed by the kernel on a crash
           .lock-evict

No shared memory, no names that could collide, no daemon. A file evicted while a process reads it stays readable to that
process: files are handed out open.
"""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec

from data_pipeline.durable import TEMPORARY, atomic_path, file_lock
from data_pipeline.errors import UserError
from data_pipeline.reading.decode.pixels import BadSample

_STRIPES = 64
_ATTEMPTS = 4
_CHUNK = 1 << 22


class FetchError(BadSample):
    """A remote file could not be fetched."""


class FileCache:
    """Copies under `folder`, at most `size_bytes` of them besides the newest one; the least recently used go first."""

    def __init__(self, folder: Path | str, size_bytes: int, *, first_wait: float = 1.0) -> None:
        self.folder = Path(folder)
        self.size_bytes = size_bytes
        self.fetched = 0  # files this process fetched
        self._first_wait = first_wait
        self._systems: dict[tuple[int, str], Any] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(self.folder / ".lock-evict", "a"):
                pass
        except OSError as error:
            raise UserError(
                f"the cache folder {folder} cannot be written ({error.strerror}); set data.cache.folder to a local one"
            ) from None

    def open(self, url: str, *, sha256: str | None = None, size: int | None = None, version: str = "") -> int:
        """Opens the local copy, fetched first where there is none. The caller closes the descriptor.

        `version` tells copies of one URL apart whose digest is not known. Raises FetchError: shard_missing,
        shard_unreachable, shard_replaced (another digest or size than asked for).
        """
        path = self.path(url, sha256 or version)
        while True:
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch(url, sha256=sha256, size=size, version=version)
                continue  # the copy exists now, unless another process has just evicted it
            with suppress(OSError):
                os.utime(file)
            return file

    def path(self, url: str, version: str) -> Path:
        """Returns where the copy is, or would be."""
        name = hashlib.sha256(f"{url}\n{version}".encode()).hexdigest()[:24]
        return self.folder / f"{name}-{url.rpartition('/')[2][-80:]}"

    def fetch(
        self, url: str, *, sha256: str | None = None, size: int | None = None, version: str = "", wait: bool = True
    ) -> bool:
        """Makes sure of a copy. With `wait` false, returns False at once where another process is fetching the file."""
        path = self.path(url, sha256 or version)
        if path.exists():
            return True
        with file_lock(self.folder / f".lock-{int(path.name[:8], 16) % _STRIPES:02d}", wait=wait) as mine:
            if not mine:
                return False
            if not path.exists():
                self._download(url, path, sha256, size)
                self.fetched += 1
        self._evict(path)
        return True

    def rename(self, url: str, version: str, sha256: str) -> None:
        """Names the copy of a version by its digest, once that is known; a copy evicted meanwhile is left out."""
        with suppress(FileNotFoundError):
            os.replace(self.path(url, version), self.path(url, sha256))

    def _download(self, url: str, path: Path, sha256: str | None, size: int | None) -> None:
        for old in self.folder.glob(f".{path.name}.*{TEMPORARY}"):  # their writers are gone: this process has the lock
            old.unlink(missing_ok=True)
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(self._first_wait * 2 ** (attempt - 1))
            try:
                with atomic_path(path) as temporary:
                    digest, length = self._copy(url, temporary)
                    if (size is not None and length != size) or (sha256 is not None and digest != sha256):
                        found = f"{url} has {length} bytes and sha256 {digest}"
                        raise FetchError("shard_replaced", f"{found}, the manifest says {size} and {sha256}")
                return
            except FileNotFoundError:
                raise FetchError("shard_missing", f"{url} does not exist") from None
            except FetchError as error:
                failure = error
            except Exception as error:  # each file system raises errors of its own
                failure = FetchError("shard_unreachable", f"{url}: {type(error).__name__}: {error}")
        raise failure

    def _copy(self, url: str, target: Path) -> tuple[str, int]:
        system, remote = self.system(url)
        digest, length = hashlib.sha256(), 0
        with system.open(remote, "rb") as source, open(target, "wb") as copy:
            while chunk := source.read(_CHUNK):
                copy.write(chunk)
                digest.update(chunk)
                length += len(chunk)
        return digest.hexdigest(), length

    def system(self, url: str) -> tuple[Any, str]:
        """Returns fsspec's file system for `url`, and the path in it. One a process, as event loops do not survive a
        fork, and one a host, since some (sftp://, webhdfs://) are bound to theirs."""
        protocol, _, rest = url.partition("://")
        key = (os.getpid(), f"{protocol}://{rest.partition('/')[0]}")
        if key not in self._systems:
            self._systems[key] = fsspec.core.url_to_fs(url, skip_instance_cache=True)[0]
        system = self._systems[key]
        return system, system._strip_protocol(url)

    def _evict(self, keep: Path) -> None:
        """Deletes the least recently used copies until the rest fit, but never `keep`, which was just fetched."""
        with file_lock(self.folder / ".lock-evict"):
            found = []
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):
                    if not path.name.startswith("."):
                        state = path.stat()
                        found.append((state.st_mtime_ns, state.st_size, path))
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= self.size_bytes:
                    return
                if path != keep:
                    path.unlink(missing_ok=True)
                    total -= size

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_systems": {}}
