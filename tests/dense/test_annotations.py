"""COCO's JSON and label maps into sets, and out again as targets; what is wrong with them has a reason or an error."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dense_sets import CATEGORIES, shapes, write_coco, write_label_maps
from PIL import Image

from data_pipeline.curation.decisions import SetPath
from data_pipeline.curation.resharding import Running, merge_sets, reshard_set
from data_pipeline.curation.takedown import take_down
from data_pipeline.errors import UserError
from data_pipeline.format import index_shard, open_set, read_sidecar
from data_pipeline.preparation import ImageRules, pack_coco, pack_label_maps
from data_pipeline.preparation.annotations.pack import without_exif
from data_pipeline.preparation.inspection import verify
from data_pipeline.preparation.packing.samples import pack_shard, read_samples
from data_pipeline.reading import DataConfig, Reader
from data_pipeline.reading.dense import LabelMaps, Objects, parse_annotation, whole_pictures
from data_pipeline.reading.dense.objects import outline_mask


def config(folder: Path, **data: object) -> DataConfig:
    plain = {"sources": [{"path": str(folder)}], "views": 1, "workers": 0, "image_size": 128}
    return DataConfig.model_validate({**plain, "rectangle": {"shorter": [64], "longer": 128}, **data})


def reasons(output: Path) -> dict[str, str]:
    manifest = open_set(output)
    rows = [row for entry in manifest.shards for row in read_sidecar(output / entry.sidecar).to_pylist()]
    return {row["url"]: row["reason"] for row in rows if row["status"] == "rejected"}


def test_packed_objects_are_those_of_the_file(coco_set: Path) -> None:
    manifest = open_set(coco_set)
    assert manifest.classes == tuple(CATEGORIES.values()) and manifest.about["category_ids"] == "3,17,44"
    for picture in whole_pictures(coco_set):
        pixels, expected = shapes(picture.position)
        found = parse_annotation(picture.raw)
        assert found.image_id == 1000 + picture.position and np.array_equal(picture.pixels, pixels)
        assert len(found.objects) == len(expected)
        for one, (category, mask, _) in zip(found.objects, expected, strict=True):
            assert one["category"] == list(CATEGORIES).index(category)
            assert np.array_equal(outline_mask(one["segmentation"], *mask.shape), mask)


def test_a_shard_indexed_anew_or_written_again_keeps_its_annotations(coco_set: Path, tmp_path: Path) -> None:
    manifest = open_set(coco_set)
    entry = manifest.shards[0]
    columns = ["annotation_member", "annotation_offset", "annotation_size", "annotation_sha256", "sha256"]
    packed = read_sidecar(coco_set / entry.sidecar).select(columns)
    assert index_shard(coco_set / entry.name).select(columns).equals(packed)
    again = pack_shard(tmp_path, 0, 0, read_samples(coco_set, entry), classes=manifest.classes)
    assert again.sha256 == entry.sha256


def test_a_damaged_annotation_is_found_by_verify_and_reader(coco_set: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(coco_set, tmp_path / "set"))
    entry = open_set(folder).shards[1]
    row = read_sidecar(folder / entry.sidecar).to_pylist()[1]
    with open(folder / entry.name, "r+b") as file:  # still JSON: another category, which no parser would notice
        file.seek(row["annotation_offset"])
        content = file.read(row["annotation_size"])
        file.seek(row["annotation_offset"] + content.index(b'"category":') + len(b'"category":'))
        file.write(b"2" if content[file.tell() :][:1] != b"2" else b"1")
    found = verify(folder)
    assert [(one.key, one.what) for one in found.problems if one.key] == [
        (row["key"], "annotation has another sha256 than the sidecar says")
    ]
    told: list[dict] = []
    pictures = whole_pictures(folder, events=told.append, max_bad_rate=0.5)
    assert len(list(pictures)) == 7 and [one["reason"] for one in told] == ["annotation_damaged"]


def test_a_set_written_into_other_shards_keeps_its_annotations(coco_set: Path, label_set: Path, tmp_path: Path) -> None:
    for source in (coco_set, label_set):
        output = tmp_path / source.parent.name
        reshard_set(SetPath(source), output, samples_per_shard=5, running=Running(workers=1))
        assert verify(output).sound and open_set(output).about["annotations"] == open_set(source).about["annotations"]
        before, after = (
            [picture.raw.members["annotation"] for picture in whole_pictures(folder)] for folder in (source, output)
        )
        assert before == after and len(after) == 8
    with pytest.raises(UserError, match="same kind of annotations and the same classes"):
        merge_sets([SetPath(coco_set), SetPath(label_set)], tmp_path / "merged")


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.3, 0.9), (2.5, 3.0)])
def test_boxes_and_masks_move_with_the_pixels(coco_set: Path, flip: float, scale: tuple[float, float]) -> None:
    settings = config(coco_set, augmentation={"flip": flip})
    assert settings.rectangle is not None
    settings.rectangle.scale = scale
    colours = np.array([(220, 40, 40), (40, 200, 60), (50, 80, 230)])
    seen = 0
    with Reader(settings, Objects(masks=True), batch_size=8) as reader:
        for batch in (next(reader.batches(step)) for step in range(3)):
            for row, (height, width) in enumerate(batch.targets.sizes.tolist()):
                view = batch.views[row, 0].numpy()
                assert not view[height:].any() and not view[:, width:].any()
                for box, label, mask in zip(
                    batch.targets.boxes[row], batch.targets.labels[row], batch.targets.masks[row], strict=True
                ):
                    assert tuple(mask.shape) == (height, width)
                    near = np.abs(view[:height, :width].astype(int) - colours[label]).max(-1) < 40
                    near &= mask.numpy() > 0
                    if mask.sum() > 150:  # smaller ones are mostly edge
                        assert near.sum() >= 0.8 * mask.sum(), "the object's colour lies under its mask"
                    ys, xs = np.nonzero(mask.numpy())
                    tight = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                    assert np.abs(tight - box.numpy()).max() <= 1 + max(scale), (tight, box)
                    seen += int(mask.sum() > 150)
    assert seen >= 6


def test_label_maps_move_with_the_pixels(label_set: Path) -> None:
    settings = config(label_set, augmentation={"flip": 0.5}, image_size=96)
    assert settings.rectangle is not None
    settings.rectangle.scale = (0.5, 2.0)
    colours = np.array([(220, 40, 40), (40, 200, 60), (50, 80, 230)])
    with Reader(settings, LabelMaps(96), batch_size=8) as reader:
        batch = next(reader.batches())
    assert batch.targets.sizes.max() == 96
    found = 0
    for row, (height, width) in enumerate(batch.targets.sizes.tolist()):
        values, view = batch.targets.maps[row].numpy(), batch.views[row, 0].numpy()
        assert (values[height:] == 255).all() and (values[:, width:] == 255).all()
        for label in range(3):
            if (values == label).sum() > 150:  # smaller ones are mostly edge
                near = np.abs(view.astype(int) - colours[label]).max(-1) < 80
                assert near[values == label].mean() > 0.8
                found += 1
    assert found >= 4


def test_what_contradicts_itself_is_an_error_with_file_and_id(coco_files, tmp_path: Path) -> None:
    def refused(change, *words: str) -> None:
        images, file = write_coco(tmp_path / words[0], 3, change)
        with pytest.raises(UserError) as caught:
            pack_coco(images, tmp_path / words[0] / "set", file, workers=1)
        assert all(word in str(caught.value) for word in (str(file), *words[1:])), caught.value

    refused(lambda c: c["annotations"][1].update(category_id=5), "category", "annotation 2", "category_id 5")
    refused(lambda c: c["annotations"][0].update(image_id=9), "stray", "annotation 1", "image_id 9")
    refused(lambda c: c["annotations"][2].pop("bbox"), "lacks", "id 3", "bbox")
    refused(lambda c: c["annotations"].append(c["annotations"][0]), "twice", "twice", "annotations")
    refused(lambda c: c.pop("categories"), "none", "categories")


@pytest.mark.parametrize("cut", [1, 300, -3])
def test_a_cut_file_is_an_error_with_its_place(coco_files, tmp_path: Path, cut: int) -> None:
    images, file = coco_files()
    file.write_text(file.read_text()[:cut])
    with pytest.raises(UserError, match=r"instances\.json: not the JSON of annotations, at character \d+"):
        pack_coco(images, tmp_path / "set", file, workers=1)


def test_objects_without_extent_are_left_out_with_their_ids(coco_files, tmp_path: Path) -> None:
    def change(content: dict) -> None:
        one, two, three, four = content["annotations"][:4]
        one["bbox"] = [3, 3, 0, 12]
        two["segmentation"] = [[1, 1, 5, 5]]
        three["segmentation"] = {"size": [1, 1], "counts": "01"}
        four["segmentation"] = {"size": [72, 104], "counts": [5, -3, 9]}

    images, file = coco_files(change)
    summary = pack_coco(images, tmp_path / "set", file, workers=1)
    assert summary.left_out == {"segmentation_unreadable": 2, "box_without_area": 1, "polygon_too_short": 1}
    lines = [json.loads(line) for line in (tmp_path / "set" / "left_out.jsonl").read_text().splitlines()]
    assert [(line["annotation"], line["reason"]) for line in lines][:2] == [
        (1, "box_without_area"),
        (2, "polygon_too_short"),
    ]
    assert all(line["file"] == str(file) for line in lines)
    objects = [one for picture in whole_pictures(tmp_path / "set") for one in parse_annotation(picture.raw).objects]
    assert summary.objects == len(objects) and not {1, 2, 3, 4} & {one["id"] for one in objects}


def test_pictures_that_are_missing_or_of_another_size_are_rejected_rows(coco_files, tmp_path: Path) -> None:
    images, file = coco_files(lambda content: content["images"][2].update(width=81))
    (images / "0001.png").unlink()
    (images / "0003.png").write_bytes(b"no picture")
    summary = pack_coco(images, tmp_path / "set", file, workers=1)
    assert summary.packed == 1 and summary.rows == 4
    assert reasons(tmp_path / "set") == {
        "0001.png": "image_missing", "0002.png": "size_differs", "0003.png": "not_an_image"
    }  # fmt: skip


def test_label_maps_that_do_not_fit_are_rejected_rows(tmp_path: Path) -> None:
    images, maps = write_label_maps(tmp_path, 6)
    (maps / "0001.png").unlink()
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(maps / "0002.png")
    Image.fromarray(np.zeros((72, 104, 3), np.uint8)).save(maps / "0003.png")
    Image.fromarray(np.full((64, 96), 9, np.uint8)).save(maps / "0004.png")
    summary = pack_label_maps(
        images, tmp_path / "set", maps, classes=("a", "b", "c", "d"), reduce_zero_label=True, workers=1
    )
    assert summary.packed == 2
    assert reasons(tmp_path / "set") == {
        "0001.jpg": "label_map_missing", "0002.jpg": "label_map_size_differs",
        "0003.jpg": "label_map_unreadable", "0004.jpg": "label_map_class_unknown",
    }  # fmt: skip
    with pytest.raises(UserError, match="--classes"):
        pack_label_maps(images, tmp_path / "other", maps, classes=())


def test_annotated_pictures_are_neither_turned_nor_shrunk(tmp_path: Path) -> None:
    images, file = write_coco(tmp_path, 2)
    with pytest.raises(UserError, match="keep their size"):
        pack_coco(images, tmp_path / "set", file, rules=ImageRules(shorter_side=32))
    exif = Image.Exif()
    exif[274] = 3
    upside_down = tmp_path / "turned.jpg"
    Image.fromarray(shapes(0)[0]).save(upside_down, quality=95, exif=exif)
    with Image.open(upside_down) as image:
        stored = np.asarray(image)
    upside_down.write_bytes(without_exif(upside_down.read_bytes()))
    with Image.open(upside_down) as image:
        assert not image.getexif() and np.array_equal(np.asarray(image), stored)


def test_crowds_are_kept_in_the_set_and_no_target(coco_files, tmp_path: Path) -> None:
    images, file = coco_files(lambda content: content["annotations"][0].update(iscrowd=1))
    pack_coco(images, tmp_path / "set", file, workers=1)
    kept = [one for picture in whole_pictures(tmp_path / "set") for one in parse_annotation(picture.raw).objects]
    assert sum(one["iscrowd"] for one in kept) == 1
    with Reader(config(tmp_path / "set"), Objects(masks=False), batch_size=4) as reader:
        batch = next(reader.batches())
    assert sum(map(len, batch.targets.labels)) == len(kept) - 1 and batch.targets.masks == ()


COUNT = """
import sys
from pathlib import Path
from data_pipeline.preparation.annotations.coco import CocoIndex
index = CocoIndex(Path(sys.argv[1]), Path(sys.argv[2]))
objects = sum(len(picture.objects) for picture in index.pictures())
index.close()
# ru_maxrss would keep the peak of the process that started this one
(line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(objects, line.split()[1])
"""


def test_a_hundred_thousand_annotations_are_read_in_bounded_memory(tmp_path: Path) -> None:
    def write(path: Path, count: int) -> int:
        outline = json.dumps([[float(v) for v in range(16)]])
        with open(path, "w") as file:
            file.write('{"categories": [{"id": 7, "name": "a"}], "annotations": [')
            for number in range(count):
                head = f'{{"id": {number}, "image_id": {number // 10}, "category_id": 7, "bbox": [1, 2, 3, 4], '
                file.write(("," if number else "") + head + f'"area": 12, "iscrowd": 0, "segmentation": {outline}}}')
            file.write('], "images": [')
            for number in range(count // 10):
                one = {"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 64}
                file.write(("," if number else "") + json.dumps(one))
            file.write("]}")
        return path.stat().st_size

    used = []
    for count in (40_000, 100_000):
        size = write(tmp_path / f"{count}.json", count)
        words = [sys.executable, "-c", COUNT, str(tmp_path / f"{count}.json"), str(tmp_path)]
        objects, kilobytes = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        assert int(objects) == count
        used.append(int(kilobytes) * 1024)
    assert size > 18e6 and used[1] - used[0] < 0.1 * size, "memory does not grow with the file"


def test_what_is_taken_down_takes_its_annotation_along(coco_files, tmp_path: Path) -> None:
    images, file = coco_files()
    pack_coco(images, tmp_path / "set", file, workers=1)
    manifest = open_set(tmp_path / "set")
    rows = read_sidecar(tmp_path / "set" / manifest.shards[0].sidecar).to_pylist()
    (tmp_path / "list.txt").write_text(f"sha256:{rows[1]['sha256']}\n")
    take_down([SetPath(tmp_path / "set")], tmp_path / "list.txt", erase=True, workers=1)
    data = (tmp_path / "set" / manifest.shards[0].name).read_bytes()
    for number, row in enumerate(rows):
        part = data[row["annotation_offset"] : row["annotation_offset"] + row["annotation_size"]]
        assert any(part) == (number != 1)
    assert [picture.position for picture in whole_pictures(tmp_path / "set")] == [0, 2, 3]
