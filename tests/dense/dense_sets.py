"""Small pictures of coloured shapes with exact boxes, masks and label maps, laid out as COCO and ADE are."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from data_pipeline.preparation import pack_coco, pack_label_maps

CATEGORIES = {3: "disc", 17: "box", 44: "bar"}  # ids with gaps
COLOURS = {3: (220, 40, 40), 17: (40, 200, 60), 44: (50, 80, 230)}
Shape = tuple[int, np.ndarray, list[float] | None]  # category, mask [H, W], polygon


def shapes(number: int) -> tuple[np.ndarray, list[Shape]]:
    """Picture `number`, uint8 [H, W, 3], and its objects; the sixth has none. Sizes differ."""
    random = np.random.default_rng(number)
    height, width = [(64, 96), (96, 64), (80, 80), (72, 104)][number % 4]
    pixels = np.full((height, width, 3), random.integers(90, 130), np.uint8)
    pixels = pixels + random.integers(0, 12, pixels.shape, dtype=np.uint8)
    found: list[Shape] = []
    count = 0 if number % 8 == 5 else 1 + number % 3
    for place in range(count):
        category = list(CATEGORIES)[(number + place) % 3]
        mask = np.zeros((height, width), np.uint8)
        left, top = 4 + place * width // count, int(random.integers(4, height // 3))
        size = int(random.integers(18, max(19, min(height // 2, width // count - 6))))
        polygon: list[float] | None = None
        if category == 3:
            cv2.circle(mask, (left + size // 2, top + size // 2), size // 2, 1, -1)
        else:
            tall = size if category == 17 else max(8, size // 3)
            mask[top : top + tall, left : left + size] = 1
            polygon = [left, top, left + size, top, left + size, top + tall, left, top + tall]
        pixels[mask > 0] = COLOURS[category]
        found = [(one, other & ~mask, None if (other & mask).any() else outline) for one, other, outline in found]
        found.append((category, mask, polygon))
    return pixels, [shape for shape in found if shape[1].any()]


def write_coco(folder: Path, pictures: int, change: Callable[[dict], None] = lambda content: None) -> tuple[Path, Path]:
    from pycocotools import mask as rle

    images = folder / "images"
    images.mkdir(parents=True)
    content: dict = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": identity, "name": name} for identity, name in CATEGORIES.items()]
    for number in range(pictures):
        pixels, found = shapes(number)
        name = f"{number:04d}.png"
        Image.fromarray(pixels).save(images / name)
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        content["images"].append({"id": 1000 + number, "file_name": name, **size})
        for category, mask, polygon in found:
            ys, xs = np.nonzero(mask)
            left, top = int(xs.min()), int(ys.min())
            coded = rle.encode(np.asfortranarray(mask))
            outline = [polygon] if polygon else {"size": list(mask.shape), "counts": coded["counts"].decode()}
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 1000 + number,
                    "category_id": category,
                    "bbox": [left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": outline,
                }
            )
    change(content)
    file = folder / "instances.json"
    file.write_text(json.dumps(content))
    return images, file


def write_label_maps(folder: Path, pictures: int) -> tuple[Path, Path]:
    """ADE's layout: 0 is no class, 1 the first of CATEGORIES; the ground of every second picture is unlabelled."""
    images, maps = folder / "images", folder / "annotations"
    images.mkdir(parents=True)
    maps.mkdir()
    for number in range(pictures):
        pixels, found = shapes(number)
        Image.fromarray(pixels).save(images / f"{number:04d}.jpg", quality=95)
        values = np.full(pixels.shape[:2], 0 if number % 2 else 4, np.uint8)
        for category, mask, _ in found:
            values[mask > 0] = 1 + list(CATEGORIES).index(category)
        Image.fromarray(values).save(maps / f"{number:04d}.png")
    return images, maps


def pack_shapes(folder: Path, pictures: int, *, label_maps: bool = False) -> Path:
    if label_maps:
        images, maps = write_label_maps(folder, pictures)
        classes = (*CATEGORIES.values(), "ground")
        pack_label_maps(
            images, folder / "set", maps, classes=classes, reduce_zero_label=True, workers=1, rows_per_shard=3
        )
    else:
        images, file = write_coco(folder, pictures)
        pack_coco(images, folder / "set", file, workers=1, rows_per_shard=3)
    return folder / "set"
