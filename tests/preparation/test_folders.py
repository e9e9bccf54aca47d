"""Folders of images: every file is a row, belongs to one, or is counted."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.format import read_manifest, read_sidecar
from data_pipeline.preparation import ImageRules, TableFormat, pack
from data_pipeline.preparation.sources.folders import Folder


@pytest.fixture
def jpeg(picture: Callable, encode: Callable) -> bytes:
    return encode(picture(0))


def sidecar(folder: Path) -> list[dict]:
    manifest = read_manifest(folder)
    return [row for entry in manifest.shards for row in read_sidecar(manifest.sidecar_path(entry)).to_pylist()]


def test_every_file_is_a_row_or_is_counted(tmp_path: Path, jpeg: bytes, picture: Callable, encode: Callable) -> None:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.jfif", "c.JPE", "noend", "sub/d.jpeg"):
        (folder / name).write_bytes(jpeg)
    (folder / "e.avif").write_bytes(encode(picture(1), "AVIF"))
    (folder / "f.heic").write_bytes(b"\0\0\0\x1cftypheic" + bytes(50))
    for name in ("README", "data.csv", "movie.mp4", "sub/nothing"):
        (folder / name).write_bytes(b"no picture")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "orphan.txt").write_text("whose?")
    (folder / "a.TXT").write_text("a caption")
    os.symlink("nowhere", folder / "broken.jpg")
    os.mkfifo(folder / "pipe.jpg")
    done = pack(folder, tmp_path / "set", workers=1)
    names = ["a.jpg", "b.jfif", "c.JPE", "e.avif", "f.heic", "noend", "sub/d.jpeg"]
    assert [row["url"] for row in sidecar(tmp_path / "set")] == names
    assert done.rejected == {"format_unsupported": 1} and done.packed == 6
    assert done.passed_over == {
        "no_picture": 4, "hidden": 1, "text_without_image": 1, "broken_link": 1, "no_plain_file": 1
    }  # fmt: skip
    assert sidecar(tmp_path / "set")[0]["caption"] == "a caption"


def test_linked_folders_are_followed_without_loops(tmp_path: Path, jpeg: bytes) -> None:
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    (folder / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "far.jpg").write_bytes(jpeg)
    os.symlink(elsewhere, folder / "linked")
    os.symlink(elsewhere / "far.jpg", folder / "near.jpg")
    os.symlink(folder, folder / "deep" / "loop")
    source = Folder(folder)
    assert [row.url for row in source.rows()] == ["linked/far.jpg", "near.jpg"]
    assert source.passed_over() == {"link_loop": 1} and source.count() == 2


def test_names_with_dots_pair_by_stem_or_as_webdataset_does(tmp_path: Path, jpeg: bytes) -> None:
    for name in ("a.left.jpg", "a.right.jpg", "b.1.jpg", "photo.final.jpg"):
        (tmp_path / name).write_bytes(jpeg)
    (tmp_path / "a.left.txt").write_text("left")
    (tmp_path / "a.txt").write_text("of a")
    (tmp_path / "b.2.txt").write_text("nobody's")
    (tmp_path / "photo.json").write_text(json.dumps({"caption": "final"}))
    source = Folder(tmp_path)
    assert {row.url: row.caption for row in source.rows()} == {
        "a.left.jpg": "left", "a.right.jpg": "of a", "b.1.jpg": None, "photo.final.jpg": "final"
    }  # fmt: skip
    assert source.passed_over() == {"text_without_image": 1}


def test_rows_come_in_the_order_of_their_relative_paths(tmp_path: Path, jpeg: bytes) -> None:
    names = ["a/1.jpg", "a-b/1.jpg", "a.jpg", "a0.jpg", "b/c/2.jpg", "b/c.jpg", "B.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg)
    assert [row.url for row in Folder(tmp_path).rows()] == sorted(names)


def test_a_mark_before_a_caption_is_no_part_of_it(tmp_path: Path, jpeg: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaption\r\n")
    assert next(Folder(tmp_path).rows()).caption == "caption"
    (tmp_path / "a.txt").write_text("x" * 50)
    assert next(Folder(tmp_path, max_caption=49).rows()).reason == "caption_too_long"


def test_a_changed_caption_is_another_input(tmp_path: Path, jpeg: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg)
    (tmp_path / "a.txt").write_text("one")
    before = Folder(tmp_path).identity()
    assert before == Folder(tmp_path).identity()
    (tmp_path / "a.txt").write_text("another")
    assert before != Folder(tmp_path).identity()


def test_devices_and_large_files_are_read_up_to_the_cap(tmp_path: Path, jpeg: bytes) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg)
    (tmp_path / "images" / "b.jpg").write_bytes(jpeg + bytes(5000))
    os.symlink("/dev/zero", tmp_path / "zero.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    paths = ["images/a.jpg", "images/b.jpg", "zero.jpg", "fifo.jpg", "images"]
    (tmp_path / "t.csv").write_text("image\n" + "".join(f"{path}\n" for path in paths))
    rules = ImageRules(max_bytes=len(jpeg) + 1000)
    done = pack(tmp_path / "t.csv", tmp_path / "set", rules=rules, workers=1)
    assert [row["reason"] for row in sidecar(tmp_path / "set")] == [
        "",
        "too_large",
        "not_a_file",
        "not_a_file",
        "not_a_file",
    ]
    assert done.packed == 1


def test_a_folder_of_parquet_parts_is_no_folder_of_images(tmp_path: Path, jpeg: bytes) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for n in range(2):
        (tmp_path / "data").mkdir(exist_ok=True)
        table = pa.table({"image": [{"bytes": jpeg, "path": f"{n}.jpg"}], "text": [[f"caption {n}", "other"]]})
        pq.write_table(table, tmp_path / "data" / f"train-{n}.parquet")
    done = pack(tmp_path / "data", tmp_path / "set", format=TableFormat(captions="join"), workers=1)
    found = sidecar(tmp_path / "set")
    assert done.packed == 2 and [row["caption"] for row in found] == ["caption 0 other", "caption 1 other"]
    assert [row["text"] for row in found] == [["caption 0", "other"], ["caption 1", "other"]]
    assert [row["url"] for row in found] == ["0.jpg", "1.jpg"]
