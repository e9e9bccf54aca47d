"""Reads the shards of a list in an order drawn from a number, so that the hosts of a sorted list mix. No row gets
another number or place: only when it is asked for changes.

    list  ->  a file of the output folder, shard by shard, without a name  ->  shards in keyed order
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from data_pipeline.hashing import key, permutation
from data_pipeline.preparation.sources.rows import Row

Shard = tuple[int, Iterable[Row]]
_PURPOSE = int.from_bytes(b"mixing", "big")
_FIELDS = pa.schema(
    {
        "number": pa.int64(),
        "caption": pa.string(),
        "label": pa.int32(),
        "url": pa.string(),
        "reason": pa.string(),
        "expected": pa.string(),
    }
)
_FURTHER = "further."  # before the names of further columns


def in_keyed_order(shards: Iterable[Shard], seed: int, further: pa.Schema, folder: Path) -> Iterator[Shard]:
    """Yields shards of rows whose labels are numbers by now, in the order that `seed` draws.

    The rows lie in `folder` meanwhile, compressed, and are gone when this ends or is killed. Memory: 16 bytes a shard.
    """
    columns = pa.schema([*_FIELDS, *(pa.field(_FURTHER + one.name, one.type) for one in further)])
    with tempfile.TemporaryFile(dir=folder) as file:
        places: list[tuple[int, int]] = []
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        for number, rows in shards:
            places.append((number, file.tell()))
            with pa.ipc.new_stream(file, columns, options=options) as writer:
                writer.write_table(pa.Table.from_pylist([_as_record(row) for row in rows], schema=columns))
        for at in permutation(key(_PURPOSE, seed), len(places)).tolist():
            number, offset = places[at]
            file.seek(offset)
            with pa.ipc.open_stream(file) as reader:
                yield number, [_as_row(record) for record in reader.read_all().to_pylist()]


def _as_record(row: Row) -> dict[str, object]:
    record: dict[str, object] = {name: getattr(row, name) for name in _FIELDS.names}
    return record | {_FURTHER + name: value for name, value in row.further.items()}


def _as_row(record: dict[str, object]) -> Row:
    own = {name: record.pop(name) for name in _FIELDS.names}
    return Row(**own, further={name.removeprefix(_FURTHER): value for name, value in record.items()})  # type: ignore[arg-type]
