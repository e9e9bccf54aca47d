"""Writes one shard. Equal samples in equal order give equal bytes; a killed writer leaves no shard."""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from data_pipeline.durable import atomic_file
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
        self._scope = ExitStack()
        self._file = self._scope.enter_context(atomic_file(path))

    def add(self, key: str, members: Mapping[str, bytes]) -> dict[str, Place]:
        """Appends a sample's members in the order given; returns where each one's data lies.

        Raises ValueError for a key with a dot (WebDataset splits key from extension there) or too long for ustar.
        """
        if "." in key:
            raise ValueError(f"sample key {key!r} holds a dot, where readers split the key from the extension")
        places = {}
        before = b""  # the small pieces between the members' data are written together
        for extension, data in members.items():
            before += ustar.encode_header(f"{key}.{extension}", len(data))
            places[extension] = Place(self.bytes + len(before), len(data))
            self._write(before)
            self._write(data)
            before = ustar.padding(len(data))
        self._write(before)
        self.samples += 1
        return places

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
            self._write(ustar.END)
            self.sha256 = self._digest.hexdigest()
        self._scope.__exit__(kind, error, trace)
