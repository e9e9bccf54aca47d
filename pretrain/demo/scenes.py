"""The embedded scenes: OpenMoji drawings composed into pictures whose boxes, masks and label maps are exact.

    OUTPUT/SPLIT/images/00000.png       1 to 12 drawings, some in front of others, on plain and textured grounds
    OUTPUT/SPLIT/instances.json         COCO's layout; categories: the nine groups of emoji
    OUTPUT/SPLIT/label_maps/00000.png   ADE's layout: 1 to 9 the groups, 10 the ground
    OUTPUT/SPLIT/objects  .../labels    the same, packed

The splits' concepts are those of the embedded set (`data_pipeline.preparation.sources.openmoji`): no drawing of a
validation or held-out scene shows a concept that a training scene, or the pretraining, has.
"""

import json
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from data_pipeline.durable import write_durably
from data_pipeline.executors.processes import available, ordered_map
from data_pipeline.format import packed_rows, read_manifest, read_sidecar
from data_pipeline.preparation import pack_coco, pack_label_maps
from data_pipeline.preparation.sources.emoji_drawings import CLASSES, Drawing, drawings
from data_pipeline.reading.decode.pixels import Pixels

SPLITS = {"train": "train", "validation": "validation", "held-out": "held-out"}  # scenes -> the embedded set's split
GROUND = len(CLASSES) + 1
MOST = 12  # drawings of a scene
_SIDES, _DRAWN = (144, 224), (28, 88)  # of a scene, and of a drawing's longer side, pixels
_VISIBLE, _TRIES = 0.45, 12  # share of a drawing that those in front leave; places tried for each
_RENDERED = 128  # pixels of a drawing before it is scaled
_FEWEST = 60  # visible pixels of an object


class Cutout(NamedTuple):
    """A drawing without its margin: uint8 [h, w, 4], and its group from 0."""

    pixels: NDArray[np.uint8]
    group: int


class Scene(NamedTuple):
    """pixels: uint8 [H, W, 3]. objects: each one's group and visible pixels, bool [H, W]."""

    pixels: Pixels
    objects: list[tuple[int, NDArray[np.bool_]]]


def build_scenes(
    shards: Path, output: Path, *, counts: dict[str, int], seed: int = 0, drawings_a_split: int = 600
) -> dict[str, Path]:
    """Writes and packs `counts` scenes a split; the folder of each. shards: of `build_openmoji`.

    A pure function of the drawings and the seed; what is finished is left alone.
    """
    folders = {split: output / split for split in counts}
    known = {f"{one.artist.source}{one.path.name}": one for one in drawings()[0]}
    for number, (split, count) in enumerate(counts.items()):
        folder = folders[split]
        if not (folder / "instances.json").exists():
            chosen = _drawings_of(shards / SPLITS[split], known)[: min(drawings_a_split, MOST * count)]
            cut = list(ordered_map(_cut_out, [one.path for one in chosen], min(4, available())))
            pool = [Cutout(pixels, one.label) for pixels, one in zip(cut, chosen, strict=True)]
            _write(folder, [compose(pool, np.random.default_rng((seed, number, scene))) for scene in range(count)])
        pack_coco(folder / "images", folder / "objects", folder / "instances.json", workers=1)
        classes = (*CLASSES, "ground")
        maps = partial(pack_label_maps, folder / "images", folder / "labels", folder / "label_maps", workers=1)
        maps(classes=classes, reduce_zero_label=True)
    return folders


def compose(pool: Sequence[Cutout], random: np.random.Generator) -> Scene:
    """One scene. Drawings are laid on top of each other in the order in which they are drawn; one that would hide too
    much of another gets another place, or none.
    """
    height, width = (int(side) for side in random.integers(_SIDES[0], _SIDES[1] + 1, 2))
    pixels = ground(height, width, random)
    objects: list[tuple[int, NDArray[np.bool_], int]] = []  # group, what is seen, area when nothing was in front
    for _ in range(int(random.integers(1, MOST + 1))):
        cutout = pool[int(random.integers(len(pool)))]
        side = int(random.integers(_DRAWN[0], _DRAWN[1] + 1))
        tall, wide = cutout.pixels.shape[:2]
        size = max(4, round(wide * side / max(tall, wide))), max(4, round(tall * side / max(tall, wide)))
        drawn = cv2.resize(cutout.pixels, size, interpolation=cv2.INTER_AREA)
        if random.random() < 0.5:
            drawn = drawn[:, ::-1]
        for _ in range(_TRIES):
            top = int(random.integers(0, height - drawn.shape[0] + 1))
            left = int(random.integers(0, width - drawn.shape[1] + 1))
            mask = np.zeros((height, width), bool)
            mask[top : top + drawn.shape[0], left : left + drawn.shape[1]] = drawn[..., 3] > 127
            left_over = [(group, seen & ~mask, area) for group, seen, area in objects]
            enough = all(seen.sum() >= max(_FEWEST, _VISIBLE * area) for _, seen, area in left_over)
            if enough and mask.sum() >= _FEWEST:
                box = pixels[top : top + drawn.shape[0], left : left + drawn.shape[1]]
                share = drawn[..., 3:].astype(np.float32) / 255
                box[:] = np.round(box * (1 - share) + drawn[..., :3] * share).astype(np.uint8)
                objects = [*left_over, (cutout.group, mask, int(mask.sum()))]
                break
    return Scene(pixels, [(group, seen) for group, seen, _ in objects])


def ground(height: int, width: int, random: np.random.Generator) -> Pixels:
    """A plain ground, a gradient, soft noise or stripes, uint8 [height, width, 3]."""
    first, second = random.integers(60, 256, (2, 3)).astype(np.float32)
    kind = int(random.integers(4))
    if kind == 0:
        share = np.zeros((height, width), np.float32)
    elif kind == 1:
        share = np.linspace(0, 1, height, dtype=np.float32)[:, None] * np.ones(width, np.float32)
    elif kind == 2:
        coarse = random.random((int(random.integers(3, 12)), int(random.integers(3, 12)))).astype(np.float32)
        share = np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    else:
        slope, period = random.uniform(-1, 1), random.uniform(8, 40)
        places = np.arange(height)[:, None] * slope + np.arange(width)
        share = (0.5 + 0.5 * np.sin(places * 2 * np.pi / period)).astype(np.float32)
    return np.round(first + share[..., None] * (second - first)).astype(np.uint8)


def coco_content(scenes: Sequence[Scene]) -> dict[str, Any]:
    """The scenes' objects as COCO's instances JSON has them."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes):
        height, width = scene.pixels.shape[:2]
        images.append({"id": number + 1, "file_name": _name(number), "height": height, "width": width})
        for group, seen in scene.objects:
            coded = rle.encode(np.asfortranarray(seen.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": group + 1,
                    "bbox": [float(value) for value in rle.toBbox(coded)],
                    "area": int(rle.area(coded)),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": coded["counts"].decode("ascii")},
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def label_map(scene: Scene) -> NDArray[np.uint8]:
    """uint8 [H, W]: 1 to 9 the groups, GROUND elsewhere."""
    values = np.full(scene.pixels.shape[:2], GROUND, np.uint8)
    for group, seen in scene.objects:
        values[seen] = group + 1
    return values


def _write(folder: Path, scenes: Sequence[Scene]) -> None:
    for name in ("images", "label_maps"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        Image.fromarray(scene.pixels).save(folder / "images" / _name(number))
        Image.fromarray(label_map(scene)).save(folder / "label_maps" / _name(number))
    write_durably(folder / "instances.json", json.dumps(coco_content(scenes)))


def _name(number: int) -> str:
    return f"{number:05d}.png"


def _drawings_of(folder: Path, known: dict[str, Drawing]) -> list[Drawing]:
    """OpenMoji's drawings in a set of the embedded ones, in its order, which is that of chance."""
    manifest = read_manifest(folder)
    urls = [
        url
        for entry in manifest.shards
        for url in packed_rows(read_sidecar(manifest.sidecar_path(entry)))["url"].to_pylist()
    ]
    return [known[url] for url in urls if url in known and known[url].artist.name == "openmoji"]


def _cut_out(path: Path) -> NDArray[np.uint8]:
    import resvg_py

    text = path.read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=text, width=_RENDERED, height=_RENDERED, skip_system_fonts=True)
    drawn = Image.open(BytesIO(png)).convert("RGBA")
    return np.asarray(drawn.crop(drawn.getchannel("A").getbbox() or (0, 0, *drawn.size)))
