"""Writes one shard. Equal samples in equal order give equal bytes; a killed writer leaves no shard."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from data_pipeline.durable import sync_folder, temporary_path
from data_pipeline.format import ustar


class Place(NamedTuple):
    """Where a member's data lies in its shard, bytes."""

    offset: int
    size: int


class ShardWriter:
    """`with ShardWriter(path) as shard: shard.add(key, {"jpg": ..., "txt": ..., "json": ...})`.

    The tar grows under a temporary name and takes its own when the block ends without an error (fsync, rename).
    `bytes` and `sha256` describe the file once it is closed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = 0
        self.bytes = 0
        self.sha256 = ""
        self._digest = hashlib.sha256()
        self._temporary = temporary_path(path)
        self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by close() or abort()

    def add(self, key: str, members: Mapping[str, bytes]) -> dict[str, Place]:
        """Appends a sample's members in the order given; returns where each one's data lies.

        Raises ValueError for a key with a dot (WebDataset splits key from extension there) or too long for ustar.
        """
        if "." in key:
            raise ValueError(f"sample key {key!r} holds a dot, where readers split the key from the extension")
        places = {}
        for extension, data in members.items():
            self._write(ustar.encode_header(f"{key}.{extension}", len(data)))
            places[extension] = Place(self.bytes, len(data))
            self._write(data)
            self._write(ustar.padding(len(data)))
        self.samples += 1
        return places

    def close(self) -> None:
        """Ends the archive and gives it its name."""
        self._write(ustar.END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)
        self.sha256 = self._digest.hexdigest()

    def abort(self) -> None:
        """Leaves nothing behind."""
        self._file.close()
        with suppress(FileNotFoundError):
            self._temporary.unlink()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
