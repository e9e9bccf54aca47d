"""Labels: what stands for a number, for a name, for nothing; and what a foreign set makes of them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from data_pipeline.executors.processes import ordered_map
from data_pipeline.format import index_set, index_shard, open_set
from data_pipeline.format.labels import LARGEST_CLASS_COUNT, InvalidLabelError, read_label


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (7, 7), ("7", 7), (7.0, 7), ("7.0", 7), (" 3\n", 3), ("0012", 12), ("cat", "cat"), ("2 cats", "2 cats"),
        (None, None), ("", None), ("N/A", None), ("nan", None), (float("nan"), None), (-1, None), ("-1", None),
        ("-1.0", None), (0, 0), (99_999, 99_999), ("NA", "NA"), ("none", "none"), ("Infinity", "Infinity"),
    ],
)  # fmt: skip
def test_a_label_is_what_it_was_meant_to_be(value: object, meant: object) -> None:
    assert read_label(value) == meant


@pytest.mark.parametrize(
    "value", [True, [], {}, b"x", 2.5, "2.5", -2, "-7", LARGEST_CLASS_COUNT, "9" * 5000, 10**30, "1e99", 1e300]
)
def test_what_no_class_can_have_is_refused(value: object) -> None:
    with pytest.raises(InvalidLabelError):
        read_label(value)


def test_cls_labels_of_a_foreign_set_get_classes(make_picture: Callable, pack_shard: Callable) -> None:
    files = {f"{n}.jpg": make_picture(n) for n in range(3)} | {f"{n}.cls": str(2 * n).encode() for n in range(3)}
    assert open_set(pack_shard(files).parent).classes == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("label", ["2147483647", "99999999999999999999", "cat", "1.5"])
def test_a_cls_that_no_class_can_have_is_noted(label: str, make_picture: Callable, pack_shard: Callable) -> None:
    path = pack_shard({"a.jpg": make_picture(0), "a.cls": label.encode(), "b.jpg": make_picture(1), "b.cls": b"1"})
    assert index_shard(path)["reason"].to_pylist() == ["label_invalid", ""]
    assert open_set(path.parent).classes == ("0", "1")


def test_a_set_that_grew_has_its_classes_extended(make_picture: Callable, pack_shard: Callable) -> None:
    def labelled(number: int, **fields: object) -> dict[str, bytes]:
        return {f"{number}.jpg": make_picture(number), f"{number}.json": json.dumps(fields).encode()}

    folder = pack_shard(labelled(0, label=0, label_name="ant") | labelled(2, label=2, label_name="cat")).parent
    assert open_set(folder).classes == ("ant", "1", "cat")
    pack_shard(labelled(4, label=4, label_name="eel") | labelled(1, label=1, label_name="bee"), "00001.tar")
    assert open_set(folder).classes == ("ant", "bee", "cat", "3", "eel")


def test_workers_index_as_one_process_does(make_picture: Callable, pack_shard: Callable, tmp_path: Path) -> None:
    for n in range(3):
        folder = pack_shard({"a.jpg": make_picture(n), "a.cls": str(n).encode()}, f"{n:05d}.tar").parent
    alone, together = (
        index_set(folder, tmp_path / "1"),
        index_set(folder, tmp_path / "2", each=partial(ordered_map, workers=2)),
    )
    assert (alone.shards, alone.classes) == (together.shards, together.classes) and alone.classes == ("0", "1", "2")


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"BZh9"])
def test_a_compressed_archive_is_said_to_be_one(magic: bytes, tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(magic + bytes(2000))
    assert index_shard(tmp_path / "00000.tar")["reason"].to_pylist() == ["compressed_archive"]
