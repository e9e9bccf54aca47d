"""Pictures that are in no shard set: a sub-folder a class, or a folder with transformers' metadata.jsonl or .csv.

FOLDER/CLASS/**/PICTURE        classes in the order of their names
FOLDER/metadata.jsonl          {"file_name": ..., "label" or "class": ..., "text" or "caption": ...} a line
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import UserError
from data_pipeline.reading import Batch, ImageTextTargets, SampleRef
from data_pipeline.reading.decode.centre import render_centre
from data_pipeline.reading.decode.pixels import BadSample
from data_pipeline.reading.faults import Fault, FaultLog

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
METADATA = ("metadata.jsonl", "metadata.csv")
MOST_PIXELS, MOST_BAD = 100_000_000, 0.01


@dataclass(frozen=True)
class Picture:
    path: Path
    label: int  # -1 where there is none
    caption: str | None


@dataclass(frozen=True)
class PictureFolder:
    """classes: None where the pictures have no labels."""

    folder: Path
    pictures: tuple[Picture, ...]
    classes: tuple[str, ...] | None

    def batches(
        self, image_size: int, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch[ImageTextTargets]]:
        """As `evaluation_batches` gives those of a shard set: timm's centre cut; ranks take contiguous shares.

        Raises BadDataError where more than one in a hundred cannot be read.
        """
        first, last = (len(self.pictures) * r // world_size for r in (rank, rank + 1))
        log = FaultLog(MOST_BAD, None)
        for step, start in enumerate(range(first, last, batch_size)):
            positions = np.arange(start, min(start + batch_size, last), dtype=np.int64)
            views, kept, faults = [], [], []
            for position in positions.tolist():
                path = self.pictures[position].path
                try:
                    views.append(render_centre(path.read_bytes(), MOST_PIXELS, image_size, 1.0)[0])
                    kept.append(position)
                except (BadSample, OSError) as bad:
                    reason = bad.reason if isinstance(bad, BadSample) else "unreadable"
                    faults.append(
                        Fault(position, self.folder.name, "", str(path), position, reason, str(bad), ("", ""))
                    )
            log.add(step, positions, faults)
            log.check()
            if kept:
                yield self._batch(step, kept, views)

    def _batch(self, step: int, kept: list[int], views: list[np.ndarray]) -> Batch[ImageTextTargets]:
        chosen = [self.pictures[position] for position in kept]
        labels = torch.tensor([picture.label for picture in chosen])
        targets = ImageTextTargets(
            tokens=torch.zeros(len(kept), 0, dtype=torch.int64),
            has_text=torch.tensor([picture.caption is not None for picture in chosen]),
            labels=labels,
            has_label=labels >= 0,
            captions=tuple(picture.caption for picture in chosen),
        )
        keys = [picture.path.relative_to(self.folder).as_posix() for picture in chosen]
        samples = tuple(SampleRef(self.folder.name, "", key, row) for key, row in zip(keys, kept, strict=True))
        crops = torch.zeros(len(kept), 1, 6)
        return Batch(step, 0, torch.tensor(kept), torch.from_numpy(np.stack(views))[:, None], crops, targets, samples)


def is_picture_folder(path: Path | str) -> bool:
    """Whether this is a local folder of pictures rather than a shard set."""
    folder = Path(path)
    return folder.is_dir() and not (folder / "manifest.json").is_file() and not any(folder.glob("*.tar"))


def list_pictures(path: Path | str) -> PictureFolder:
    """Raises UserError where the folder holds no picture, or its metadata do not name those that it holds."""
    folder = Path(path)
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is not None:
        return _from_metadata(folder, metadata)
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and any(_pictures(entry))))
    if not classes:
        bare = tuple(Picture(file, -1, None) for file in _pictures(folder))
        if not bare:
            raise UserError(
                f"{folder}: neither a shard set (no manifest.json) nor a folder of pictures (a sub-folder a class, or "
                f"{' or '.join(METADATA)})"
            )
        return PictureFolder(folder, bare, None)
    found = [Picture(file, row, None) for row, name in enumerate(classes) for file in _pictures(folder / name)]
    return PictureFolder(folder, tuple(found), classes)


def _pictures(folder: Path) -> Iterable[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file())


def _from_metadata(folder: Path, metadata: Path) -> PictureFolder:
    rows = _rows(metadata)
    labels = [_first(row, ("label", "class", "category")) for row in rows]
    # Numbers are their own order; names stand in the alphabet's, as those of sub-folders do.
    named = {label for label in labels if label is not None}
    classes = tuple(sorted(named, key=lambda name: (_number(name), name)))
    place, found = {name: row for row, name in enumerate(classes)}, []
    for row, label in zip(rows, labels, strict=True):
        file = folder / str(row["file_name"])
        if not file.is_file():
            raise UserError(f"{metadata}: names {row['file_name']!r}, which is not in {folder}")
        found.append(Picture(file, -1 if label is None else place[label], _first(row, ("text", "caption"))))
    return PictureFolder(folder, tuple(found), classes or None)


def _rows(metadata: Path) -> list[dict[str, Any]]:
    text = metadata.read_text(encoding="utf-8")
    try:
        rows = (
            list(csv.DictReader(text.splitlines()))
            if metadata.suffix == ".csv"
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except ValueError as error:
        raise UserError(f"{metadata}: {error}") from None
    if not rows or any("file_name" not in row for row in rows):
        raise UserError(f"{metadata}: each row needs file_name, the picture's path from {metadata.parent}")
    return rows


def _first(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((str(row[key]) for key in keys if row.get(key) not in (None, "")), None)


def _number(name: str) -> float:
    return float(name) if name.isdecimal() else math.inf
