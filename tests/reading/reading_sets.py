"""Small sets made on the spot, and a tokenizer that needs no vocabulary."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_pipeline.format import Manifest, ShardEntry, ShardWriter, write_manifest, write_sidecar
from data_pipeline.format.sidecar import table
from data_pipeline.reading import Batch, ImageTextTargets


def picture(number: int, size: tuple[int, int] = (40, 32), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """An image whose pixels depend on `number`. `size` is (width, height)."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return file.getvalue()


def write_set(
    folder: Path,
    sizes: Sequence[int],
    *,
    captions: bool = True,
    classes: Sequence[str] | None = None,
    image: Callable[[int], bytes] = picture,
    caption: Callable[[int], str] = "picture {}".format,
) -> Manifest:
    """A prepared set: shards of the given sizes, each sample with a picture of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, number = [], 0
    for shard, size in enumerate(sizes):
        path = folder / f"{shard:05d}.tar"
        rows = []
        with ShardWriter(path) as writer:
            for n in range(size):
                data, key = image(number), f"{shard:05d}{n:04d}"
                members = {"jpg": data}
                if captions:
                    members["txt"] = caption(number).encode()
                members["json"] = json.dumps({"url": f"https://pictures.invalid/{number}"}).encode()
                places = writer.add(key, members)
                rows.append(
                    {
                        "row": n,
                        "status": "packed",
                        "reason": "",
                        "key": key,
                        "url": f"https://pictures.invalid/{number}",
                        "sha256": hashlib.sha256(data).hexdigest(),
                        "caption": caption(number) if captions else None,
                        "label": number % len(classes) if classes else None,
                        "image_offset": places["jpg"].offset,
                        "image_size": places["jpg"].size,
                        "image_format": "jpeg",
                    }
                )
                number += 1
        write_sidecar(path.with_suffix(".parquet"), table(rows))
        entries.append(ShardEntry(path.name, f"{path.stem}.parquet", size, writer.bytes, writer.sha256))
    return write_manifest(folder, name=folder.name, shards=entries, classes=classes)


def tokenize(texts: list[str]) -> torch.Tensor:
    """8 bytes of each caption: enough to tell captions apart."""
    rows = [list(text.encode()[-8:].ljust(8, b"\0")) for text in texts]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), 8)


def tensors(batch: Batch[ImageTextTargets]) -> dict[str, torch.Tensor]:
    """Every tensor of a batch, by name."""
    own = {name: getattr(batch, name) for name in ("positions", "views", "crops")}
    return own | {name: getattr(batch.targets, name) for name in ("tokens", "has_text", "labels", "has_label")}
