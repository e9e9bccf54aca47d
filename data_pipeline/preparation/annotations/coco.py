"""COCO's instances JSON, one entry a picture, whatever the size of the file: its items go into an index on disk.

instances.json  {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
                 "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, w, h], "area", "iscrowd",
                                  "segmentation": [[x, y, ...], ...] | {"counts", "size"}}]}

What contradicts itself (a category or a picture that the file does not have, an id twice) is an error with the file and
the id. An object that has no extent is left out with its reason: `box_without_area`, `polygon_too_short`,
`segmentation_unreadable`.
"""

import json
import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as rle

from data_pipeline.errors import UserError, first_ten
from data_pipeline.preparation.annotations.json_stream import stream_lists

NO_AREA = "box_without_area"
SHORT_POLYGON = "polygon_too_short"
BAD_SEGMENTATION = "segmentation_unreadable"
_BATCH = 10_000  # rows of one insertion


@dataclass(frozen=True)
class LeftOut:
    """An object that is not packed."""

    annotation: int
    image: int
    reason: str


@dataclass(frozen=True)
class Picture:
    """One entry of `images` with its objects, categories numbered from 0."""

    number: int
    id: int
    file_name: str
    width: int
    height: int
    objects: tuple[dict[str, Any], ...]
    left_out: tuple[LeftOut, ...]


class CocoIndex:
    """The instances file as a database in `folder`, which is removed with `close`.

    names: of the categories, in the order of their ids; ids: those. Raises UserError where the file contradicts itself.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self._file = folder / "annotations.sqlite"
        self._file.unlink(missing_ok=True)
        self._database = sqlite3.connect(self._file)
        self._database.execute("PRAGMA journal_mode=OFF")
        self._database.execute("PRAGMA synchronous=OFF")
        self._database.execute("CREATE TABLE images (number INTEGER PRIMARY KEY, id INTEGER UNIQUE, content TEXT)")
        self._database.execute("CREATE TABLE objects (id INTEGER PRIMARY KEY, image INTEGER, category, content TEXT)")
        try:
            self.ids, self.names = self._fill()
            self._check()
        except BaseException:
            self.close()
            raise
        self._numbers = {category: number for number, category in enumerate(self.ids)}

    def __len__(self) -> int:
        return int(self._database.execute("SELECT COUNT(*) FROM images").fetchone()[0])

    def pictures(self) -> Iterator[Picture]:
        """Yields the pictures in the order of the file."""
        with closing(self._database.cursor()) as cursor:
            for number, identity, content in cursor.execute("SELECT number, id, content FROM images ORDER BY number"):
                found = self._database.execute(
                    "SELECT content FROM objects WHERE image = ? ORDER BY id", (identity,)
                ).fetchall()
                image = json.loads(content)
                kept, left_out = self._objects(
                    [json.loads(one[0]) for one in found], int(image["width"]), int(image["height"])
                )
                yield Picture(
                    number, identity, image["file_name"], int(image["width"]), int(image["height"]), kept, left_out
                )

    def close(self) -> None:
        self._database.close()
        self._file.unlink(missing_ok=True)

    def _fill(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        categories: dict[int, str] = {}
        rows: dict[str, list[tuple[Any, ...]]] = {"images": [], "annotations": []}
        number = 0
        for key, item in stream_lists(self.path):
            if key == "categories":
                identity = self._identity(item, key, ("name",))
                if identity in categories:
                    raise UserError(f"{self.path}: category {identity} stands twice in 'categories'")
                categories[identity] = str(item["name"])
            elif key == "images":
                identity = self._identity(item, key, ("file_name", "width", "height"))
                kept = {name: item[name] for name in ("file_name", "width", "height")}
                rows[key].append((number, identity, json.dumps(kept)))
                number += 1
            elif key == "annotations":
                identity = self._identity(item, key, ("image_id", "category_id", "bbox"))
                category = item["category_id"] if isinstance(item["category_id"], int) else repr(item["category_id"])
                rows[key].append((identity, self._integer(item, "image_id", key), category, json.dumps(item)))
            for name, batch in rows.items():
                if len(batch) >= _BATCH:
                    self._insert(name, batch)
        for name, batch in rows.items():
            self._insert(name, batch)
        self._database.execute("CREATE INDEX by_image ON objects (image)")
        if not number or not categories:
            raise UserError(f"{self.path}: has no 'images' or no 'categories'; COCO's instances JSON was expected")
        ordered = sorted(categories)
        return tuple(ordered), tuple(categories[identity] for identity in ordered)

    def _insert(self, key: str, batch: list[tuple[Any, ...]]) -> None:
        into = {"images": "images VALUES (?, ?, ?)", "annotations": "objects VALUES (?, ?, ?, ?)"}[key]
        try:
            self._database.executemany(f"INSERT INTO {into}", batch)
        except (sqlite3.IntegrityError, OverflowError) as error:
            raise UserError(f"{self.path}: an id stands twice in {key!r}, or is no 64-bit number: {error}") from None
        batch.clear()

    def _check(self) -> None:
        strays = self._database.execute(
            "SELECT id, image FROM objects WHERE image NOT IN (SELECT id FROM images) LIMIT 11"
        ).fetchall()
        if strays:
            named = first_ten([f"annotation {one} (image_id {image})" for one, image in strays])
            raise UserError(f"{self.path}: these belong to pictures that 'images' does not have: {named}")
        known = set(self.ids)
        for (category,) in self._database.execute("SELECT DISTINCT category FROM objects").fetchall():
            if category not in known:
                (identity,) = self._database.execute(
                    "SELECT MIN(id) FROM objects WHERE category = ?", (category,)
                ).fetchone()
                raise UserError(
                    f"{self.path}: annotation {identity} has category_id {category}, which 'categories' does not have"
                )

    def _objects(
        self, items: list[dict[str, Any]], width: int, height: int
    ) -> tuple[tuple[dict[str, Any], ...], tuple[LeftOut, ...]]:
        kept, left_out = [], []
        for item in items:
            segmentation, reason = _segmentation(item.get("segmentation"), width, height)
            box = _box(item["bbox"])
            if box is None:
                reason = NO_AREA
            if reason or box is None:
                left_out.append(LeftOut(item["id"], item["image_id"], reason))
                continue
            entry = {"id": item["id"], "category": self._numbers[item["category_id"]], "bbox": box}
            entry["area"] = float(item["area"]) if isinstance(item.get("area"), int | float) else box[2] * box[3]
            entry["iscrowd"] = int(bool(item.get("iscrowd")))
            kept.append(entry | ({} if segmentation is None else {"segmentation": segmentation}))
        return tuple(kept), tuple(left_out)

    def _identity(self, item: Any, key: str, needs: tuple[str, ...]) -> int:
        if not isinstance(item, dict):
            raise UserError(f"{self.path}: an entry of {key!r} is {type(item).__name__}, an object was expected")
        if lacking := [name for name in ("id", *needs) if name not in item]:
            raise UserError(f"{self.path}: an entry of {key!r} (id {item.get('id')!r}) lacks {', '.join(lacking)}")
        return self._integer(item, "id", key)

    def _integer(self, item: dict[str, Any], name: str, key: str) -> int:
        value = item[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{self.path}: {name} {value!r} of an entry of {key!r} is no whole number")
        return value


def _box(box: Any) -> list[float] | None:
    """[x, y, w, h] where it has an area, else None."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        return None
    values = [float(v) for v in box]
    return values if all(map(math.isfinite, values)) and values[2] > 0 and values[3] > 0 else None


def _segmentation(found: Any, width: int, height: int) -> tuple[Any, str]:
    """The outline as it is packed, and the reason where it cannot be: polygons, or an RLE with its counts as text."""
    if found is None or found == []:
        return None, ""
    if isinstance(found, dict):
        try:
            if [int(v) for v in found["size"]] != [height, width]:
                return None, BAD_SEGMENTATION
            coded = rle.frPyObjects(found, height, width) if isinstance(found["counts"], list) else found
            counts = coded["counts"]
            plain = {"size": [height, width], "counts": counts.decode() if isinstance(counts, bytes) else str(counts)}
            decoded = rle.decode(plain).shape
        except (KeyError, TypeError, ValueError, UnicodeDecodeError, MemoryError):
            return None, BAD_SEGMENTATION
        return (plain, "") if decoded == (height, width) else (None, BAD_SEGMENTATION)
    if not isinstance(found, list):
        return None, BAD_SEGMENTATION
    for polygon in found:
        if not isinstance(polygon, list) or not all(isinstance(v, int | float) and math.isfinite(v) for v in polygon):
            return None, BAD_SEGMENTATION
        if len(polygon) < 6 or len(polygon) % 2:
            return None, SHORT_POLYGON
    return found, ""
