"""The columns of a sidecar that reading needs, parsed once a node and shared by its workers as a mapped file.

    FOLDER/<hash of the sidecar's identity>.arrow     Arrow's own layout, uncompressed: opening it parses nothing

At 256 ranks a worker takes five samples of a shard before it goes on to the next one; parsing ten thousand rows for
them would cost more than decoding. A file is named for the sidecar's device, inode, size, time and the machine's boot,
so that one that is out of date, or that a crash left half-written, is never opened.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.durable import TEMPORARY, temporary_path
from data_pipeline.format import slot_rows
from data_pipeline.format.sidecar import HARMLESS_NOTES, PACKED

_LAYOUT = 2
_COLUMNS = ("status", "reason", "key", "sha256", "caption", "label", "image_offset", "image_size")
_NUMBERS = ("label", "image_offset", "image_size")
_KEPT_BYTES = 2 << 30  # of columns on a node; a block of shards needs about 2 MB a shard
_LOOKED_AFTER = 64  # files written between two looks at their size


@dataclass(frozen=True)
class SlotColumns:
    """The slots of one shard: `table` has key, caption, reason, used, label, image_offset, image_size, digest, and an
    offset, a size and, where the sidecar has it, a digest of each further member. Numbers are int64, -1 where there is
    none.
    """

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.asarray(self.table["label"])

    def key(self, row: int) -> str:
        return str(self.table["key"][row].as_py())

    def caption(self, row: int) -> str | None:
        text = self.table["caption"][row].as_py()
        return None if text is None else str(text)

    def note(self, row: int) -> str:
        """What a sample that is used lacks; "" for nothing that matters."""
        reason = str(self.table["reason"][row].as_py())
        return "" if reason in HARMLESS_NOTES else reason

    def dropped(self, row: int) -> str | None:
        """Why a slot is not used; None where it is."""
        return None if self.table["used"][row].as_py() else str(self.table["reason"][row].as_py())

    def label(self, row: int) -> int | None:
        label = int(self.table["label"][row].as_py())
        return None if label < 0 else label

    def place(self, member: str, row: int) -> tuple[int, int]:
        """Offset and size of a member (`image`, ...) in the tar; -1 where it is not there."""
        names = f"{member}_offset", f"{member}_size"
        if names[0] not in self.table.column_names:
            return -1, -1
        offset, size = (int(self.table[name][row].as_py()) for name in names)
        return offset, size

    def digest(self, row: int, member: str = "image") -> bytes | None:
        """SHA-256 of a member; None where the sidecar does not say."""
        name = "digest" if member == "image" else f"{member}_digest"
        if name not in self.table.column_names:
            return None
        found: bytes | None = self.table[name][row].as_py()
        return found


def read_columns(sidecar: Path | BinaryIO, members: Sequence[str]) -> SlotColumns:
    """Parses a sidecar. members: what of each sample is read besides its image, where the sidecar knows it."""
    with pq.ParquetFile(sidecar) as file:
        there = file.schema_arrow.names
        places = [f"{name}_{what}" for name in members for what in ("offset", "size") if f"{name}_{what}" in there]
        hashed = [name for name in members if f"{name}_sha256" in there]
        read = [*_COLUMNS, *places, *(f"{name}_sha256" for name in hashed)]
        rows = slot_rows(file.read(columns=read, use_threads=False)).combine_chunks()
    columns = {name: rows[name] for name in ("key", "caption", "reason")}
    columns |= {name: pc.cast(rows[name], pa.int64()).fill_null(-1) for name in (*_NUMBERS, *places)}
    columns |= {"used": pc.equal(rows["status"], PACKED), "digest": _digests(rows["sha256"])}
    columns |= {f"{name}_digest": _digests(rows[f"{name}_sha256"]) for name in hashed}
    return SlotColumns(pa.table(columns).combine_chunks())


def _digests(texts: pa.ChunkedArray) -> pa.Array:
    return pa.array([None if text is None else bytes.fromhex(text) for text in texts.to_pylist()], pa.binary(32))


def shared_columns(sidecar: Path | BinaryIO, members: Sequence[str], folder: Path | None) -> SlotColumns:
    """Opens what another process of this node has parsed, or parses the sidecar and leaves it to others in `folder`.

    None shares nothing, nor does a folder that cannot be written or that is somebody else's. Raises as `read_columns`.
    """
    if folder is None or not _is_own(folder):
        return read_columns(sidecar, members)
    state = os.stat(sidecar) if isinstance(sidecar, Path) else os.fstat(sidecar.fileno())
    identity = (_LAYOUT, _boot(), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, *members)
    path = folder / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.arrow"
    with suppress(OSError, pa.ArrowException):
        return _open(path)
    columns = read_columns(sidecar, members)
    with suppress(OSError):
        _write(path, columns)
    return columns


def _open(path: Path) -> SlotColumns:
    with pa.memory_map(str(path)) as mapped:
        table = pa.ipc.open_file(mapped).read_all()
    os.utime(path)  # its last use
    return SlotColumns(table)


def _write(path: Path, columns: SlotColumns) -> None:
    temporary = temporary_path(path)
    try:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, columns.table.schema) as writer:
            writer.write_table(columns.table)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if int(path.stem[:8], 16) % _LOOKED_AFTER == 0:
        evict(path.parent, _KEPT_BYTES)


def evict(folder: Path, size: int) -> None:
    """Deletes the files used least recently beyond `size` bytes. Processes that have mapped one keep it."""
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            state = path.stat()
            if path.suffix == ".arrow" or path.name.endswith(TEMPORARY):
                found.append((state.st_mtime_ns, state.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, length, path in sorted(found):
        if total <= size:
            return
        path.unlink(missing_ok=True)
        total -= length


@cache
def _is_own(folder: Path) -> bool:
    """Makes the folder; tells whether it is this user's alone, so that nobody can plant columns there."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
        return state.st_uid == os.getuid() and state.st_mode & 0o022 == 0
    return False


@cache
def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
