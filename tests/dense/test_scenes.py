"""Scenes: their masks are the pixels that are seen, their layouts are COCO's and ADE's."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from data_pipeline.errors import UserError
from data_pipeline.preparation import pack_coco, pack_label_maps
from pretrain.demo.dense import walk_dense
from pretrain.demo.scenes import GROUND, MOST, Cutout, Scene, coco_content, compose, label_map

# Drawings of one colour each, so that a pixel says which one is seen there.
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (250, 0, 250)]


def cutouts() -> list[Cutout]:
    found = []
    for group, colour in enumerate(COLOURS):
        pixels = np.zeros((40, 60, 4), np.uint8)
        pixels[..., :3], pixels[..., 3] = colour, 255
        if group % 2:
            pixels[:20, :30, 3] = 0  # an L
        found.append(Cutout(pixels, group))
    return found


def scenes(count: int) -> list[Scene]:
    return [compose(cutouts(), np.random.default_rng((0, number))) for number in range(count)]


def test_a_mask_is_what_is_seen_of_an_object() -> None:
    for scene in scenes(30):
        assert 1 <= len(scene.objects) <= MOST
        seen = np.stack([mask for _, mask in scene.objects])
        assert seen.sum(0).max() == 1, "no pixel belongs to two objects"
        for group, mask in scene.objects:
            assert mask.sum() >= 60
            assert (np.abs(scene.pixels[mask].astype(int) - COLOURS[group]).max(-1) < 130).mean() > 0.97
        for colour in COLOURS:
            of_colour = (scene.pixels == colour).all(-1)
            assert not (of_colour & ~seen.any(0)).sum() > 20, "nothing of an object is left without a mask"
    again = scenes(2)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(again, scenes(2), strict=True))


def test_scenes_are_laid_out_as_coco_and_ade(tmp_path: Path) -> None:
    made = scenes(4)
    images, maps = tmp_path / "images", tmp_path / "maps"
    images.mkdir()
    maps.mkdir()
    for number, scene in enumerate(made):
        Image.fromarray(scene.pixels).save(images / f"{number:05d}.png")
        values = label_map(scene)
        assert set(np.unique(values)) <= {1, 2, 3, 4, 5, GROUND} and (values == GROUND).any()
        Image.fromarray(values).save(maps / f"{number:05d}.png")
    (tmp_path / "instances.json").write_text(json.dumps(coco_content(made)))
    known = COCO(str(tmp_path / "instances.json"))
    for number, scene in enumerate(made):
        annotations = known.loadAnns(known.getAnnIds(imgIds=[number + 1]))
        assert len(annotations) == len(scene.objects)
        for one, (group, mask) in zip(annotations, scene.objects, strict=True):
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert one["bbox"] == box and one["area"] == mask.sum() and one["category_id"] == group + 1
            assert np.array_equal(known.annToMask(one), mask)
    assert pack_coco(images, tmp_path / "objects", tmp_path / "instances.json", workers=1).packed == 4
    classes = [str(number) for number in range(10)]
    packed = pack_label_maps(images, tmp_path / "labels", maps, classes=classes, reduce_zero_label=True, workers=1)
    assert packed.packed == 4


def test_the_dense_walk_asks_for_the_demo_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `internimage demo --output"):
        walk_dense(tmp_path)
