"""A task brings targets of its own: boxes from the JSON member, moved with the view, padded; masks of any length."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from reading_sets import write_set
from test_reader import config

from data_pipeline.format import index_shard, read_sidecar, write_sidecar
from data_pipeline.reading import Reader, TargetSource
from data_pipeline.reading.decode.pixels import BadSample
from data_pipeline.reading.storage.shards import RawSample
from data_pipeline.reading.workers.memory import Arrays, Layout

MOST = 3
SIZES = [7, 5, 6]


@dataclass(frozen=True)
class BoxTargets:
    boxes: torch.Tensor  # float32 [B, MOST, 4] left, top, right, bottom in pixels of the first view; NaN where none
    masks: tuple[str, ...]

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return replace(self, boxes=change(self.boxes))


class Boxes:
    """A box that covers the picture, and as many small ones as the picture's number modulo three."""

    members = ("json",)

    def __init__(self, bad: int = -1) -> None:
        self._bad = bad

    def layout(self, rows: int) -> Layout:
        return {"boxes": ((rows, MOST, 4), np.float32)}

    def write(self, row: int, sample: RawSample, source: TargetSource, crops: np.ndarray, arrays: Arrays) -> str:
        number = int(json.loads(sample.members["json"])["url"].rpartition("/")[2])
        if number == self._bad:
            raise BadSample("boxes_missing", "no box in the JSON member")
        boxes = np.array([[0, 0, 40, 32], *[[4, 2, 10, 6]] * (number % MOST)], np.float32)
        top, left, height, width, flip, whole = crops[0]
        if flip:
            boxes = np.stack([whole - boxes[:, 2], boxes[:, 1], whole - boxes[:, 0], boxes[:, 3]], 1)
        scale = np.array([32 / width, 32 / height] * 2, np.float32)
        arrays["boxes"][row] = np.nan
        arrays["boxes"][row, : len(boxes)] = (boxes - np.array([left, top] * 2, np.float32)) * scale
        return "x" * number

    def incomplete(self, sample: RawSample, source: TargetSource) -> str:
        return ""

    def finish(self, extras: Sequence[object], arrays: Arrays) -> None:
        pass

    def collate(self, arrays: Arrays, extras: Sequence[object]) -> BoxTargets:
        return BoxTargets(torch.from_numpy(arrays["boxes"]), tuple(map(str, extras)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose sidecars say where the JSON members lie, as those that are packed or indexed here do."""
    found = write_set(tmp_path_factory.mktemp("sets") / "boxes", SIZES)
    for shard in found.shards:
        rows, there = read_sidecar(found.sidecar_path(shard)), index_shard(found.shard_path(shard))
        for name in ("json_offset", "json_size"):
            rows = rows.set_column(rows.schema.get_field_index(name), name, there[name])
        write_sidecar(found.sidecar_path(shard), rows)
    return found.folder


def read(folder: Path, targets: Boxes, world: int, workers: int, events: list[dict], start: int = 0) -> list[tuple]:
    """(shard, key, boxes, masks) of the rows of four steps, all ranks together."""
    chosen = config(folder, workers=workers, max_bad_rate=1.0)
    readers = [
        Reader(chosen, targets, batch_size=24, rank=rank, world_size=world, seed=5, events=events.append)
        for rank in range(world)
    ]
    rows = []
    for parts in islice(zip(*(reader.batches(start) for reader in readers), strict=True), 4):
        for batch in parts:
            own = zip(batch.samples, batch.targets.boxes, batch.targets.masks, strict=True)
            rows += [(sample.shard, sample.key, boxes.numpy().tobytes(), mask) for sample, boxes, mask in own]
    for reader in readers:
        reader.close()
    return rows


def test_boxes_lie_where_the_pixels_of_the_view_do(folder: Path) -> None:
    with Reader(config(folder), Boxes(), batch_size=24, seed=5) as reader:
        for batch in islice(reader.batches(0), 3):
            for sample, crop, boxes, mask in zip(
                batch.samples, batch.crops[:, 0], batch.targets.boxes, batch.targets.masks, strict=True
            ):
                number = sum(SIZES[: int(sample.shard[:5])]) + sample.row
                assert len(mask) == number and int((~boxes.isnan().any(1)).sum()) == 1 + number % MOST
                top, left, height, width, _, _ = crop.tolist()
                # The whole picture, 40 x 32, seen from the crop: its corners, flipped or not, are the same box.
                expected = [-left * 32 / width, -top * 32 / height, (40 - left) * 32 / width, (32 - top) * 32 / height]
                assert boxes[0].tolist() == pytest.approx(expected, abs=1e-3)


def test_targets_depend_on_ranks_and_workers_no_more_than_views_do(folder: Path) -> None:
    expected = read(folder, Boxes(), 1, 0, [])
    for world, workers in ((2, 0), (3, 2)):
        assert read(folder, Boxes(), world, workers, []) == expected
    assert read(folder, Boxes(), 2, 1, [], start=2)[:48] == expected[48:]


def test_a_sample_without_its_targets_is_replaced_and_recorded(folder: Path) -> None:
    events: list[dict] = []
    rows = read(folder, Boxes(bad=9), 2, 1, events)
    bad = ("00001.tar", "000010002")
    assert len(rows) == 96 and bad not in {row[:2] for row in rows}
    assert events and {(event["kind"], event["reason"]) for event in events} == {("bad_sample", "boxes_missing")}
    assert {(event["shard"], event["key"]) for event in events} == {bad}
    for event in events:
        used = rows[event["position"]]
        assert used[:2] == (event["replaced_by"]["shard"], event["replaced_by"]["key"])
