"""Small pictures, and what stands in a set of them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.format import Manifest, open_set, read_sidecar


def photo(number: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A picture of random blobs, whose perceptual hash is that of no other number."""
    small = np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


def all_rows(folder: Path) -> list[dict[str, Any]]:
    """Every sidecar row of a set, with the name of its shard."""
    found = open_set(folder)
    return [
        row | {"shard": entry.name}
        for entry in found.shards
        for row in read_sidecar(found.sidecar_path(entry)).to_pylist()
    ]


def member(found: Manifest, row: dict[str, Any], part: str = "image") -> bytes:
    """The bytes of a row's member as they stand in its shard."""
    data = (found.folder / row["shard"]).read_bytes()
    return data[row[f"{part}_offset"] :][: row[f"{part}_size"]]


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by relative name; locks are empty files that may stay."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
