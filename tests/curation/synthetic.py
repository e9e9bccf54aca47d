"""Writes a set of made-up sidecars (no shards): `python synthetic.py FOLDER ROWS`. 2 % exact copies, 2 % near ones."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.format import ShardEntry, write_manifest
from data_pipeline.format.sidecar import SIDECAR_SCHEMA

ROWS_A_SHARD = 10_000
COPIES = 50  # of 50 rows one is an exact copy of an earlier row, another one a near copy
_HEX = np.frombuffer(b"".join(b"%02x" % n for n in range(256)), dtype="S2")


def hexadecimal(data: np.ndarray) -> pa.Array:
    """uint8 [n, 32] -> n strings of 64 digits."""
    digits = _HEX[data].tobytes()
    offsets = np.arange(len(data) + 1, dtype=np.int32) * 64
    return pa.StringArray.from_buffers(len(data), pa.py_buffer(offsets), pa.py_buffer(digits))


def random_bytes(seed: int, numbers: np.ndarray) -> np.ndarray:
    """32 bytes for every number, the same wherever they are asked for."""
    x = numbers.astype(np.uint64)[:, None] * np.uint64(4) + np.arange(4, dtype=np.uint64) + np.uint64(seed << 40)
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))).view(np.uint8).reshape(len(numbers), 32)


def originals(rows: np.ndarray) -> np.ndarray:
    """Some earlier row for every row, itself no copy."""
    group = np.maximum(rows // COPIES, 1)
    return (group * 2654435761 >> 5) % group * COPIES + 5


def images_of(rows: np.ndarray) -> np.ndarray:
    """A number for the bytes of every row's image."""
    copied = (rows % COPIES == 1) & (rows >= COPIES)
    return np.where(copied, originals(rows), rows)


def sides(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 200 + rows % 800, 200 + rows * 7 % 800


def shard(number: int) -> pa.Table:
    rows = np.arange(number * ROWS_A_SHARD, (number + 1) * ROWS_A_SHARD)
    images, whose = images_of(rows), originals(rows)
    copied, near = images != rows, (rows % COPIES == 2) & (rows >= COPIES)
    prints = random_bytes(2, np.where(copied | near, whose, rows))
    flipped = np.random.default_rng(number).integers(0, 256, (ROWS_A_SHARD, 20))  # up to 20 bits of a near copy
    for bit in flipped.T:
        prints[near, bit[near] // 8] ^= (1 << (bit[near] % 8)).astype(np.uint8)
    text = pa.array([f"a caption of row {row}" for row in rows.tolist()])
    columns = {
        "row": pa.array(rows),
        "status": pa.array(["packed"] * len(rows)),
        "reason": pa.array([""] * len(rows)),
        "key": pa.array([f"{number:05d}{place:04d}" for place in range(len(rows))]),
        "url": pa.array([f"https://host{row % 9973}.org/{row}.jpg" for row in rows.tolist()]),
        "sha256": hexadecimal(random_bytes(1, images)),
        "width": pa.array(sides(rows)[0].astype(np.int32)),
        "height": pa.array(sides(rows)[1].astype(np.int32)),
        "caption": text,
        "image_offset": pa.array(rows % ROWS_A_SHARD * 100_000 + 512),
        "image_size": pa.array(90_000 + rows % 9_000),
        "image_format": pa.array(["jpeg"] * len(rows)),
    }
    empty = {field.name: pa.nulls(len(rows), field.type) for field in SIDECAR_SCHEMA if field.name not in columns}
    table = pa.table({name: (columns | empty)[name] for name in SIDECAR_SCHEMA.names}, schema=SIDECAR_SCHEMA)
    table = table.append_column("pdq", hexadecimal(prints))
    return table.append_column("pdq_quality", pa.array(np.full(len(rows), 99, np.int32)))


def main() -> None:
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True)
    entries = []
    for number in range(rows // ROWS_A_SHARD):
        pq.write_table(shard(number), folder / f"{number:05d}.parquet", compression="zstd", compression_level=1)
        entries.append(ShardEntry(f"{number:05d}.tar", f"{number:05d}.parquet", ROWS_A_SHARD, 10**9, "0" * 64))
    write_manifest(folder, name=folder.name, shards=entries)


if __name__ == "__main__":
    main()
