"""Rows on their way into a set: labels, digests, captions, retries; and a set that is of no use is no success."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from data_pipeline.errors import BAD_DATA, BadDataError, UserError
from data_pipeline.format import index_shard, read_manifest, read_sidecar
from data_pipeline.preparation import Columns, ImageRules, check_usable, index, pack, verify
from data_pipeline.preparation.packing.workers import surviving_map
from data_pipeline.reading.storage.shards import LocalFiles, ShardSet


def sidecar(folder: Path) -> list[dict]:
    manifest = read_manifest(folder)
    return [row for entry in manifest.shards for row in read_sidecar(manifest.sidecar_path(entry)).to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


@pytest.fixture
def table(tmp_path: Path, picture: Callable, encode: Callable) -> Callable[..., Path]:
    """Writes a CSV of as many rows as its columns have, each with an image of its own."""

    def write(name: str = "t.csv", **columns: list) -> Path:
        (tmp_path / "images").mkdir(exist_ok=True)
        count = len(next(iter(columns.values())))
        for number in range(count):
            (tmp_path / "images" / f"{number}.jpg").write_bytes(encode(picture(number)))
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", *columns])
            writer.writerows([f"images/{n}.jpg", *(values[n] for values in columns.values())] for n in range(count))
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("cells", "labels", "rejected"),
    [
        (["2", "10", "-1", "0"], [2, 10, None, 0], {}),
        (["2.0", "1", "N/A", ""], [2, 1, None, None], {}),
        (["1", "2147483647", "3", "0"], [1, None, 3, 0], {"label_invalid": 1}),
        (["1", "9" * 5000, "-7", "0"], [1, None, None, 0], {"label_invalid": 2}),
        (["cat", "ant", "n/a", "cat"], [1, 0, None, 1], {}),
        (["1.5", "2", "3", "4"], [None, 2, 3, 4], {"label_invalid": 1}),
    ],
)
def test_numbers_stay_numbers_and_no_class_is_invented(
    cells: list, labels: list, rejected: dict, table: Callable, tmp_path: Path
) -> None:
    done = pack(table(label=cells), tmp_path / "set", workers=1)
    assert [row["label"] for row in sidecar(tmp_path / "set")] == labels and done.rejected == rejected


def test_labels_that_are_identifiers_are_an_error_that_names_a_row(table: Callable, tmp_path: Path) -> None:
    path = table(label=["2119789", "2119790", "3", "2119791"])
    with pytest.raises(UserError, match=r"3 of 4 labels .* the first in row 0.*2119789"):
        pack(path, tmp_path / "set", workers=1)
    named = pack(path, tmp_path / "set", classes=["2119789", "2119790", "3"], workers=1)
    assert [row["label"] for row in sidecar(tmp_path / "set")] == [0, 1, 2, None] and named.rejected == {
        "label_invalid": 1
    }
    assert pack(path, tmp_path / "none", columns=Columns(label="none"), workers=1).classes == 0


def test_a_name_of_digits_is_a_name_where_classes_are_given(table: Callable, tmp_path: Path) -> None:
    pack(table(label=["007", "7", "-1", "1"]), tmp_path / "set", classes=["7", "007"], workers=1)
    assert [row["label"] for row in sidecar(tmp_path / "set")] == [1, 0, None, 1]


def test_labels_of_wrong_types_are_reasons(tmp_path: Path, picture: Callable, encode: Callable) -> None:
    images = [{"bytes": encode(picture(n)), "path": None} for n in range(3)]
    pq.write_table(pa.table({"image": images, "label": [[1, 2], None, []]}), tmp_path / "t.parquet")
    done = pack(tmp_path / "t.parquet", tmp_path / "set", classes=["a"], workers=1)
    assert done.rejected == {"label_invalid": 2} and done.packed == 1


def test_cls_labels_reach_the_reader(tmp_path: Path, picture: Callable, encode: Callable) -> None:
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as tar:
        for number in range(3):
            tar.write({"__key__": f"{number}", "jpg": encode(picture(number)), "cls": str(number * 3).encode()})
    assert index(tmp_path).rejected == {}
    shard = ShardSet(LocalFiles(read_manifest(tmp_path)), keep=1).shard(0)
    assert [shard.read(n).label for n in range(3)] == [0, 3, 6] and len(read_manifest(tmp_path).classes) == 7


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_an_expected_digest_is_checked(kind: str, table: Callable, tmp_path: Path) -> None:
    path = table(caption=["a", "b", "c"])
    data = (tmp_path / "images" / "0.jpg").read_bytes()
    right = hashlib.new(kind, data).hexdigest()
    path = table(**{kind: [right.upper(), right, ""]})
    done = pack(path, tmp_path / "set", rules=ImageRules(shorter_side=20), workers=1)
    found = sidecar(tmp_path / "set")
    assert done.rejected == {"hash_mismatch": 1} and [row["reason"] for row in found] == ["", "hash_mismatch", ""]
    own = f"input_{kind}" if kind == "sha256" else kind
    assert [row[own] for row in found] == [right.upper(), right, None]
    assert verify(tmp_path / "set", decode=True).sound  # the sidecar's digest is that of what was packed


def test_further_columns_stay_with_their_rows_through_a_retry(table: Callable, tmp_path: Path) -> None:
    path = table(NSFW=["no", "yes", "no"], width=["1", "2", "3"])
    moved = (tmp_path / "images" / "1.jpg").rename(tmp_path / "1.jpg")
    out = tmp_path / "set"
    pack(path, out, rows_per_shard=2, workers=1)
    assert [(row["NSFW"], row["input_width"]) for row in sidecar(out)] == [("no", "1"), ("yes", "2"), ("no", "3")]
    moved.rename(tmp_path / "images" / "1.jpg")
    done = pack(path, out, rows_per_shard=2, workers=1, retry=["image_missing"])
    assert (done.packed, done.retried, done.shards_found) == (3, 1, 1)
    pack(path, tmp_path / "new" / "set", rows_per_shard=2, workers=1)
    assert contents(out) == contents(tmp_path / "new" / "set")


def test_pack_retries_by_reason_without_reading_whole_shards(
    table: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(caption=list("abcdef"))
    (tmp_path / "images" / "1.jpg").unlink()
    (tmp_path / "images" / "4.jpg").write_bytes(b"broken")
    out = tmp_path / "set"
    pack(path, out, rows_per_shard=2, workers=1)
    before = contents(out)

    def refuse(*_: object) -> None:
        raise AssertionError("a shard was read")

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.preparation.packing.retries.read_samples", refuse)
        done = pack(path, out, rows_per_shard=2, workers=1, retry=["image_missing", "not_an_image"])
        assert (done.retried, done.shards_found) == (2, 3) and contents(out) == before
        assert pack(path, out, rows_per_shard=2, workers=1, retry=["http_*"]).retried == 0


def test_rows_without_caption_are_kept_rejected_or_get_an_empty_text(table: Callable, tmp_path: Path) -> None:
    path = table(caption=["a", "", "c"])
    kept = pack(path, tmp_path / "keep", workers=1)
    rejected = pack(path, tmp_path / "reject", captionless="reject", workers=1)
    empty = pack(path, tmp_path / "empty", captionless="empty", workers=1)
    assert (kept.packed, rejected.packed, empty.packed) == (3, 2, 3) and rejected.rejected == {"caption_missing": 1}
    for name, texts in (("keep", [b"a", None, b"c"]), ("empty", [b"a", b"", b"c"])):
        data = webdataset.WebDataset(str(tmp_path / name / "00000.tar"), shardshuffle=False)
        assert [sample.get("txt") for sample in data] == texts
        assert [row["caption"] for row in sidecar(tmp_path / name)] == ["a", None, "c"]
        assert verify(tmp_path / name).sound
    shard = ShardSet(LocalFiles(read_manifest(tmp_path / "empty")), keep=1).shard(0)
    assert (shard.read(1).caption, shard.read(1).note) == (None, "")


def test_the_plan_says_which_columns_were_taken(table: Callable, tmp_path: Path) -> None:
    said: list[str] = []
    pack(table(caption=["a"], NSFW=["no"]), tmp_path / "set", workers=1, notice=said.append)
    taken = json.loads((tmp_path / "set" / "plan.json").read_text())["input"]
    assert taken["columns"] == {"image": "image", "caption": "caption", "label": None, "url": None, "hash": None}
    assert taken["kept"] == {"NSFW": "NSFW"} and taken["read as"]["delimiter"] == ","
    assert "image from 'image', caption from 'caption'" in said[0] and "NSFW" in said[0]


DECODER = """
import os, signal, sys
from pathlib import Path
from data_pipeline.preparation import pack
from data_pipeline.preparation.packing import images

def prepare(data, rules):
    if data.endswith((b"crash", b"memory")):
        os.kill(os.getpid(), signal.SIGSEGV if data.endswith(b"crash") else signal.SIGKILL)
    return as_ever(data, rules)

as_ever, images.prepare = images.prepare, prepare  # in every process: each imports this file
if __name__ == "__main__":
    for name, rows_per_shard in (("whole", 3), ("rows", 12)):
        print(pack(Path(sys.argv[1]), Path(sys.argv[2]) / name, workers=2, rows_per_shard=rows_per_shard).rejected)
"""


def test_a_picture_that_kills_costs_only_its_row(tmp_path: Path, picture: Callable, encode: Callable) -> None:
    """Whether processes make whole shards, as here of three rows, or prepare the rows of one."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        data = encode(picture(number)) + {4: b"crash", 10: b"memory"}.get(number, b"")
        (tmp_path / "images" / f"{number:02d}.jpg").write_bytes(data)
    (tmp_path / "decoder.py").write_text(DECODER)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "decoder.py"), str(tmp_path / "images"), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert run.stdout.splitlines() == ["{'decoder_died': 2}"] * 2
    found = [sidecar(tmp_path / name) for name in ("whole", "rows")]
    assert [[row["row"] for row in one if row["reason"]] for one in found] == [[4, 10]] * 2
    assert [row["sha256"] for row in found[0]] == [row["sha256"] for row in found[1]]
    assert not [path.name for path in (tmp_path / "whole").glob(".*") if path.name != ".lock"]


def test_work_that_no_process_knows_is_an_error_not_a_loss() -> None:
    with pytest.raises(BrokenProcessPool):
        list(surviving_map(kill_nothing, range(3), 2, lambda number: number))


def kill_nothing(number: int) -> int:  # pytest's importlib mode: processes cannot import this module
    return number


def test_nothing_usable_is_no_success(table: Callable, tmp_path: Path) -> None:
    path = table(caption=["a", "b", "c", "d"])
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").unlink()
    some = pack(path, tmp_path / "some", workers=1)
    check_usable(some)
    check_usable(some, least=0.25)
    with pytest.raises(BadDataError, match=r"only 1 of 4 rows can be used \(3 image_missing\)"):
        check_usable(some, least=0.26)
    (tmp_path / "images" / "3.jpg").unlink()
    with pytest.raises(BadDataError, match="none of 4"):
        check_usable(pack(path, tmp_path / "none", workers=1))


def test_the_commands_say_so_with_exit_3(table: Callable, tmp_path: Path) -> None:
    from launch.cli import run

    path = table(caption=["a"] * 3)
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").unlink()
    assert run(["shards", "pack", str(path), str(tmp_path / "set"), "--workers", "1"]) == BAD_DATA
    (tmp_path / "urls.txt").write_text("http://127.0.0.1/x\nhttp://10.0.0.1/y\n")
    assert run(["shards", "fetch", str(tmp_path / "urls.txt"), str(tmp_path / "web"), "--workers", "1"]) == BAD_DATA
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "00000.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    assert run(["shards", "index", str(tmp_path / "gz")]) == BAD_DATA
    assert index_shard(tmp_path / "gz" / "00000.tar")["reason"].to_pylist() == ["compressed_archive"]


def test_a_shuffled_set_holds_every_row_once_and_can_be_retried(table: Callable, tmp_path: Path) -> None:
    path = table(caption=[f"caption {n}" for n in range(40)])
    lost = (tmp_path / "images" / "7.jpg").rename(tmp_path / "7.jpg")
    done = pack(path, tmp_path / "once" / "set", shuffle=5, rows_per_shard=8, workers=1)
    found = sidecar(tmp_path / "once" / "set")
    order = [row["row"] for row in found]
    assert sorted(order) == list(range(40)) != order and done.rejected == {"image_missing": 1}
    assert [row["key"] for row in found] == [f"{n // 8:05d}{n % 8:04d}" for n in range(40)]
    assert all(row["caption"] == f"caption {row['row']}" for row in found)
    assert verify(tmp_path / "once" / "set", decode=True).sound
    (tmp_path / "once" / "set" / f"{order.index(20) // 8:05d}.tar").unlink()  # made again in its place
    lost.rename(tmp_path / "images" / "7.jpg")
    again = pack(path, tmp_path / "once" / "set", shuffle=5, rows_per_shard=8, workers=1, retry=["image_missing"])
    assert (again.packed, again.rejected) == (40, {})
    pack(path, tmp_path / "anew" / "set", shuffle=5, rows_per_shard=8, workers=2)
    assert contents(tmp_path / "once" / "set") == contents(tmp_path / "anew" / "set")
    pack(path, tmp_path / "other" / "set", shuffle=6, rows_per_shard=8, workers=1)
    assert [row["row"] for row in sidecar(tmp_path / "other" / "set")] != order
    with pytest.raises(UserError, match="shuffle changed"):
        pack(path, tmp_path / "once" / "set", shuffle=6, rows_per_shard=8, workers=1)
