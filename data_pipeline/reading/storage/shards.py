"""Reads samples by offset; where a sample cannot be read, names the reason.

The sha256 of image and annotation, which stand in the sidecar, are checked on every read (a few microseconds). Only
where the image's does not match is the tar looked at, to tell damaged bytes from a replaced shard from an index out of
date.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from data_pipeline.format import Manifest, ShardEntry
from data_pipeline.format.ustar import BLOCK_BYTES, TarMember, walk
from data_pipeline.reading.decode.pixels import BadSample, DroppedSample
from data_pipeline.reading.storage.columns import SlotColumns, read_columns, shared_columns


class RawSample(NamedTuple):
    """A sample as it stands in its shard. `note` is what it lacks ("text_missing", ...); "" where all is well.

    `members`: those read besides the image, by the sidecar's names for them, where the sample has them.
    """

    key: str
    image: bytes
    caption: str | None
    label: int | None
    note: str = ""
    members: Mapping[str, bytes] = MappingProxyType({})


class ShardFiles(Protocol):
    """A set and the way to its files. Both methods raise BadSample where a file cannot be opened."""

    @property
    def manifest(self) -> Manifest: ...

    def shard(self, entry: ShardEntry) -> int:
        """Opens the tar; the caller closes the descriptor."""

    def sidecar(self, entry: ShardEntry) -> Path | BinaryIO:
        """Returns the Parquet file, or its path."""


@dataclass(frozen=True)
class LocalFiles:
    """Files in a folder."""

    manifest: Manifest

    def shard(self, entry: ShardEntry) -> int:
        path = self.manifest.shard_path(entry)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise BadSample("shard_missing" if missing else "shard_unreadable", f"{path}: {error.strerror}") from None

    def sidecar(self, entry: ShardEntry) -> Path:
        return self.manifest.sidecar_path(entry)


class OpenShard:
    """One shard with its index. Faults found on opening are raised by each `read`, so that each sample says why."""

    def __init__(
        self, entry: ShardEntry, files: ShardFiles, members: Sequence[str] = (), shared: Path | None = None
    ) -> None:
        self._entry, self._files, self._members = entry, files, tuple(members)
        self._file: int | None = None
        self._index: SlotColumns | None = None
        self._fault: BadSample | None = None
        try:
            self._index = shared_columns(files.sidecar(entry), members, shared)
        except BadSample as fault:
            self._fault = fault
        except Exception as error:  # missing, cut, or no Parquet at all: pyarrow, OSError, ValueError, KeyError
            self._fault = BadSample("sidecar_unreadable", f"{entry.sidecar}: {error}")
        try:
            self._file = files.shard(entry)
            self._size = os.fstat(self._file).st_size
        except BadSample as fault:
            self._fault = fault

    def key(self, row: int) -> str:
        """Returns the sample's key; "" where the index does not reach."""
        if self._index is None or row >= len(self._index):
            return ""
        return self._index.key(row)

    def read(self, row: int) -> RawSample:
        """Reads the sample of slot `row`. Raises BadSample, whose reasons docs/reading.md lists, or DroppedSample."""
        if self._fault is not None:
            # A new exception each time: an exception raised twice keeps every frame of the first time, with its batch.
            raise BadSample(self._fault.reason, self._fault.detail)
        assert self._index is not None and self._file is not None
        index = self._index
        if row >= len(index):
            raise BadSample("index_out_of_date", f"manifest counts {self._entry.samples} samples, sidecar {len(index)}")
        if (why := index.dropped(row)) is not None:
            raise DroppedSample("dropped", why)
        offset, size = index.place("image", row)
        if offset < 0 or size < 0:
            raise BadSample("index_out_of_date", "the sidecar gives no place for the image")
        image = self._bytes_at(offset, size)
        digest = index.digest(row)
        if digest is None:
            fault = self._misplaced(row)
        elif hashlib.sha256(image).digest() == digest:
            fault = None
        else:
            damaged = BadSample("image_damaged", "the image's sha256 is not the one in the sidecar")
            fault = self._misplaced(row) or damaged
        if fault is not None:
            self._raise_if_dropped_since(row)
            raise fault
        members = {name: self._member(name, row) for name in self._members if index.place(name, row)[0] >= 0}
        return RawSample(index.key(row), image, index.caption(row), index.label(row), index.note(row), members)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _member(self, name: str, row: int) -> bytes:
        """Reads a further member. Raises BadSample where its digest is not the sidecar's: `annotation_damaged`."""
        assert self._index is not None
        data, digest = self._bytes_at(*self._index.place(name, row)), self._index.digest(row, name)
        if digest is not None and hashlib.sha256(data).digest() != digest:
            raise BadSample(f"{name}_damaged", f"the {name}'s sha256 is not the one in the sidecar")
        return data

    def _raise_if_dropped_since(self, row: int) -> None:
        """Looks at the sidecar anew: a takedown may have erased bytes while the shard was open."""
        with suppress(OSError, ValueError, KeyError, IndexError):  # pyarrow's own errors are ValueErrors and OSErrors
            now = read_columns(self._files.sidecar(self._entry), ()).dropped(row)
            if now is not None:
                raise DroppedSample("dropped", now)

    def _bytes_at(self, offset: int, size: int) -> bytes:
        assert self._file is not None
        try:
            data = os.pread(self._file, size, offset)
        except OSError as error:
            raise BadSample("shard_unreadable", f"{error.strerror}") from None
        if len(data) < size:
            found = f"the image ends at byte {offset + size}, the shard at {self._size} (manifest: {self._entry.bytes})"
            raise BadSample("shard_cut" if self._size < self._entry.bytes else "index_out_of_date", found)
        return data

    def _misplaced(self, row: int) -> BadSample | None:
        """Returns the fault of a row whose member is not where the index says; None where the member is there."""
        assert self._index is not None
        if self._header_matches(row):
            return None
        if self._size != self._entry.bytes:
            found = f"the shard has {self._size} bytes, the manifest says {self._entry.bytes}"
            return BadSample("index_out_of_date", found)
        spread = np.unique(np.linspace(0, len(self._index) - 1, 16).astype(int))
        if 2 * sum(self._header_matches(int(n)) for n in spread) < len(spread):
            return BadSample("shard_replaced", "other members lie where the index says, though the length is the same")
        return BadSample("image_damaged", "the image and its tar header are not what the index says")

    def _header_matches(self, row: int) -> bool:
        assert self._index is not None and self._file is not None
        offset, size = self._index.place("image", row)
        block = os.pread(self._file, BLOCK_BYTES, offset - BLOCK_BYTES) if offset >= BLOCK_BYTES else b""
        if len(block) < BLOCK_BYTES:
            return False
        member = next(walk(block + bytes(size + 2 * BLOCK_BYTES)), None)
        return (
            isinstance(member, TarMember) and member.size == size and member.name.startswith(f"{self._index.key(row)}.")
        )


class ShardSet:
    """One source: its manifest, and its most recently used shards kept open.

    shared: folder of this node where parsed sidecars are left for other processes; None shares none
    """

    def __init__(
        self, files: ShardFiles, *, keep: int, members: Sequence[str] = (), shared: Path | None = None
    ) -> None:
        self.manifest, self.files = files.manifest, files
        self._keep, self._members, self._shared = keep, tuple(members), shared
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def shard(self, number: int) -> OpenShard:
        """Returns shard `number` of the manifest, opened on first use."""
        found = self._open.get(number)
        if found is None:
            found = self._open[number] = OpenShard(
                self.manifest.shards[number], self.files, self._members, self._shared
            )
            while len(self._open) > self._keep:
                self._open.popitem(last=False)[1].close()
        else:
            self._open.move_to_end(number)
        return found

    def has_labels(self) -> bool:
        """Whether a sample of the set has a label. Sidecars are read up to the first that says so."""
        for entry in self.manifest.shards:
            try:
                if (read_columns(self.files.sidecar(entry), ()).labels >= 0).any():
                    return True
            except Exception:  # a sidecar that cannot be read: its samples are bad ones, counted when they are read
                continue
        return False

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}


def _column(rows: pa.Table, name: str) -> Any:
    column = rows[name].combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
