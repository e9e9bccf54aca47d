"""pack: every layout, every row accounted for, and a set that no kill can spoil."""

import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.format import count_reasons, packed_rows, read_manifest, read_sidecar
from data_pipeline.preparation import Columns, ImageRules, pack, verify


def rows(folder: Path) -> list[dict]:
    manifest = read_manifest(folder)
    return [row for entry in manifest.shards for row in read_sidecar(manifest.sidecar_path(entry)).to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


@pytest.fixture
def images(tmp_path: Path, picture: Callable, encode: Callable) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(encode(picture(number), "PNG"))
    return folder


def test_a_captioned_folder_is_packed_or_rejected_row_by_row(captioned: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    done = pack(captioned, tmp_path / "set", rows_per_shard=5, workers=1, progress=lambda *now: told.append(now))
    assert (done.rows, done.packed, done.shards, done.shards_found, done.classes) == (12, 8, 3, 0, 0)
    reasons = {"image_empty": 1, "not_an_image": 1, "image_truncated": 1, "text_not_utf8": 1}
    assert done.rejected == reasons and done.rows == done.packed + sum(done.rejected.values())
    assert told == [(n, 12) for n in range(1, 13)]
    found = rows(tmp_path / "set")
    assert [row["row"] for row in found] == list(range(12))
    assert [row["key"] for row in found] == [f"{n // 5:05d}{n % 5:04d}" for n in range(12)]  # a place per input row
    assert [row["caption"] for row in found[:8]] == [f"picture number {n}" for n in range(8)]
    assert [row["url"] for row in found] == sorted(p.name for p in captioned.iterdir() if p.suffix != ".txt")
    assert verify(tmp_path / "set", decode=True).sound


def test_webdataset_itself_reads_the_shards(captioned: Path, tmp_path: Path) -> None:
    pack(captioned, tmp_path / "set", rows_per_shard=5, workers=1)
    urls = [str(path) for path in sorted((tmp_path / "set").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["txt"].decode() for sample in samples] == [f"picture number {n}" for n in range(8)]
    assert [sample["jpg"] for sample in samples] == [(captioned / f"{n:02d}.jpg").read_bytes() for n in range(8)]
    assert [json.loads(sample["json"])["row"] for sample in samples] == list(range(8))
    sizes = json.loads((tmp_path / "set" / "sizes.json").read_text())
    assert sizes == {"00000.tar": 5, "00001.tar": 3, "00002.tar": 0}
    stats = json.loads((tmp_path / "set" / "00001_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]["image_empty"]) == (5, 3, 1)


def test_sub_folders_are_classes(tmp_path: Path, picture: Callable, encode: Callable) -> None:
    for number, name in enumerate(["zebra", "ant", "zebra", "bee/wild"]):
        path = tmp_path / "animals" / name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(number)))
    assert pack(tmp_path / "animals", tmp_path / "set", workers=1).classes == 3
    manifest = read_manifest(tmp_path / "set")
    assert manifest.classes == ("ant", "bee", "zebra")
    assert [(row["url"], row["label"]) for row in rows(tmp_path / "set")] == [
        ("ant/1.jpg", 0),
        ("bee/wild/3.jpg", 1),
        ("zebra/0.jpg", 2),
        ("zebra/2.jpg", 2),
    ]
    data = (tmp_path / "set" / "00000.tar").read_bytes()
    row = rows(tmp_path / "set")[0]
    assert json.loads(data[row["json_offset"] :][: row["json_size"]])["label_name"] == "ant"
    pack(tmp_path / "animals", tmp_path / "plain", labels="none", workers=1)
    assert read_manifest(tmp_path / "plain").classes is None
    given = pack(tmp_path / "animals", tmp_path / "given", classes=["zebra", "ant"], workers=1)
    assert given.rejected == {"label_unknown": 1}
    assert [row["label"] for row in rows(tmp_path / "given")] == [1, None, 0, 0]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "bytes"])
def test_tables_of_every_kind_give_the_same_shards(kind: str, images: Path, tmp_path: Path) -> None:
    records = [
        {
            "file": f"images/{n}.png",
            "text": f'say "{n}", twice' if kind == "tsv" else f'say "{n}",\ttwice\nover',
            "label": ["cat", "dog"][n % 2],
            "url": f"http://x/{n}",
        }
        for n in range(6)
    ]
    records.append({"file": "images/none.png", "text": "gone", "label": "cat", "url": "http://x/6"})
    records.append({"file": "", "text": "", "label": "", "url": ""})
    table = tmp_path / f"table.{kind}"
    if kind in ("csv", "tsv"):
        with open(table, "w", newline="", encoding="utf-8-sig") as file:
            plain = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if kind == "tsv" else {}
            writer = csv.DictWriter(file, ["file", "text", "label", "url"], **plain)
            writer.writeheader()
            writer.writerows(records)
    else:
        table = tmp_path / "table.parquet"
        if kind == "bytes":
            for record in records[:6]:
                record["file"] = {"bytes": (tmp_path / record["file"]).read_bytes(), "path": None}
            for record in records[6:]:
                record["file"] = None
        pq.write_table(pa.Table.from_pylist(records), table)
    done = pack(table, tmp_path / "set", workers=1)
    assert (done.rows, done.packed, done.rejected, done.classes) == (8, 6, {"image_missing": 2}, 2)
    found = rows(tmp_path / "set")
    assert [row["caption"] for row in found[:6]] == [record["text"] for record in records[:6]]
    assert [row["label"] for row in found] == [0, 1, 0, 1, 0, 1, 0, None]
    assert [row["url"] for row in found[:7]] == [f"http://x/{n}" for n in range(7)]
    assert read_manifest(tmp_path / "set").classes == ("cat", "dog")
    assert verify(tmp_path / "set", decode=True).sound


def test_columns_can_be_named_and_paths_have_a_root(images: Path, tmp_path: Path) -> None:
    table = tmp_path / "deep" / "t.csv"
    table.parent.mkdir()
    table.write_text("id,what,where\n7,first,0.png\n7,second,1.png\n9,third,2.png\n")
    columns = Columns(image="where", caption="what", label="id")
    assert pack(table, tmp_path / "set", columns=columns, root=images, workers=1).packed == 3
    assert [(row["caption"], row["label"]) for row in rows(tmp_path / "set")] == [
        ("first", 7),
        ("second", 7),
        ("third", 9),
    ]
    assert read_manifest(tmp_path / "set").classes == tuple(map(str, range(10)))  # numbers stay numbers


def test_json_beside_an_image_gives_caption_label_and_url(images: Path, tmp_path: Path) -> None:
    (images / "0.json").write_text(json.dumps({"caption": "of json", "label": 4, "url": "http://x/0"}))
    (images / "1.json").write_text("{")
    done = pack(images, tmp_path / "set", workers=1)
    assert done.rejected == {"bad_json": 1}
    first = rows(tmp_path / "set")[0]
    assert (first["caption"], first["label"], first["url"]) == ("of json", 4, "http://x/0")


def test_text_that_is_no_utf8_rejects_its_row_alone(images: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"image,caption\nimages/0.png,fine\nimages/1.png,caf\xe9\n")
    assert pack(tmp_path / "t.csv", tmp_path / "set", workers=1).rejected == {"text_not_utf8": 1}


def test_names_and_captions_that_are_no_text_spoil_no_shard(images: Path, tmp_path: Path) -> None:
    (images / "0.json").write_text('{"caption": "\\ud800"}')
    (images / "1.json").write_text('{"label": true, "url": 5}')
    os.rename(images / "5.png", os.fsencode(images) + b"/caf\xe9.png")
    done = pack(images, tmp_path / "set", workers=1)
    assert done.rejected == {"text_not_utf8": 1, "label_invalid": 1} and done.packed == 4 and done.classes == 0
    assert rows(tmp_path / "set")[5]["url"] == "caf?.png"


def test_labels_of_a_column_with_gaps_are_numbers(images: Path, tmp_path: Path) -> None:
    table = pa.table({"image": [f"images/{n}.png" for n in range(4)], "label": [2.0, None, float("nan"), 0.0]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert pack(tmp_path / "t.parquet", tmp_path / "set", workers=1).packed == 4
    assert [row["label"] for row in rows(tmp_path / "set")] == [2, None, None, 0]


def test_a_killed_run_leaves_no_processes_behind(captioned: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from data_pipeline.preparation import pack\n"
        "if __name__ == '__main__':\n"
        "    pack(Path(sys.argv[1]), Path(sys.argv[2]), workers=2, progress=lambda n, _: time.sleep(60 * (n > 1)))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(script), str(captioned), str(tmp_path / "set")], env=environment)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 200
    while not list((tmp_path / "set").glob(".*.tar.*.partial")):  # a shard is begun: the workers are at work
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    workers = [int(child) for child in children.read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=200)
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(workers) >= 2


def test_rules_reach_the_images(images: Path, tmp_path: Path) -> None:
    done = pack(images, tmp_path / "set", rules=ImageRules(shorter_side=12, quality=80), workers=2)
    assert done.packed == 6
    row = rows(tmp_path / "set")[3]
    data = (tmp_path / "set" / "00000.tar").read_bytes()[row["image_offset"] :][: row["image_size"]]
    assert Image.open(io.BytesIO(data)).size == (16, 12) == (row["width"], row["height"])
    assert row["image_format"] == "jpeg"


def test_packing_again_changes_nothing_and_other_options_are_refused(captioned: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    pack(captioned, out, rows_per_shard=5, workers=1)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    again = pack(captioned, out, rows_per_shard=5, workers=2)
    assert (again.shards_found, again.rows, again.packed) == (3, 12, 8)
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    with pytest.raises(UserError, match="rules changed"):
        pack(captioned, out, rows_per_shard=5, rules=ImageRules(shorter_side=9))
    (captioned / "00.txt").write_text("another caption")
    with pytest.raises(UserError, match="input changed"):
        pack(captioned, out, rows_per_shard=5)
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}


def test_a_lost_shard_is_made_again_as_it_was(captioned: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    pack(captioned, out, rows_per_shard=5, workers=1)
    before = contents(out)
    (out / "00001.tar").unlink()
    (out / "00002.parquet").unlink()
    assert pack(captioned, out, rows_per_shard=5, workers=1).shards_found == 1
    assert contents(out) == before


def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_bytes(
    tmp_path: Path, picture: Callable, encode: Callable
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(240):
        (source / f"{number:03d}.png").write_bytes(encode(picture(number, (160, 120)), "PNG"))
        (source / f"{number:03d}.txt").write_text(f"picture {number}")
    rules = ImageRules(shorter_side=40)
    pack(source, tmp_path / "whole", rows_per_shard=12, rules=rules, workers=1)
    code = (
        "import sys; from pathlib import Path; from data_pipeline.preparation import ImageRules, pack\n"
        "pack(Path(sys.argv[1]), Path(sys.argv[2]), rows_per_shard=12, rules=ImageRules(shorter_side=40), workers=1)"
    )
    out = tmp_path / "killed" / "whole"  # the set is named for its folder
    command = [sys.executable, "-c", code, str(source), str(out)]
    finished = 0
    for more, rest in ((0, 0.004), (1, 0.0), (3, 0.007)):  # of 20 shards; at any point of the work on the next one
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 200
        while len(list(out.glob("*_stats.json"))) < finished + more or not list(out.glob(".*.partial")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        time.sleep(rest)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=200) == -signal.SIGKILL
        now = len(list(out.glob("*_stats.json")))
        assert now >= finished + more  # nothing that was finished is lost
        finished = now
    assert not (out / "manifest.json").exists()
    pack(source, out, rows_per_shard=12, rules=rules, workers=1)
    assert contents(out) == contents(tmp_path / "whole")
    assert verify(out, decode=True).sound


def test_killed_between_the_three_files_of_a_shard_it_finishes_or_forgets_it(
    captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole" / "set"
    pack(captioned, whole, workers=1)
    replace, sync, unlink = os.replace, os.fsync, Path.unlink

    def spare(path: Path, missing_ok: bool = False) -> None:
        """A kill leaves what was being written."""
        if not path.name.endswith(".partial"):
            unlink(path, missing_ok)

    for step in itertools.count():
        out = tmp_path / str(step) / "set"
        left = step

        def stumble(work: Callable) -> Callable:
            def wrapped(*arguments: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt  # as good as a kill: what is on disk now is what the next run finds
                return work(*arguments)

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stumble(replace))
            patch.setattr(os, "fsync", stumble(sync))
            patch.setattr(Path, "unlink", spare)
            try:
                pack(captioned, out, workers=1)
                break
            except KeyboardInterrupt:
                pass
        pack(captioned, out, workers=1)
        assert contents(out) == contents(whole), step
    assert step > 15  # every fsync and every rename of a set of one shard


def test_two_runs_do_not_write_to_one_folder(captioned: Path, tmp_path: Path) -> None:
    from data_pipeline.preparation.packing import output

    with output.hold_output(tmp_path / "set", {}), pytest.raises(UserError, match="another run"):
        pack(captioned, tmp_path / "set", workers=1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda at: pack(at / "none.csv", at / "set"), "does not exist"),
        (lambda at: pack(at / "none.xml", at / "set"), "neither a folder nor"),
        (lambda at: pack(at / "empty", at / "set"), "no rows"),
        (lambda at: pack(at / "captioned", at / "captioned" / "set"), "inside"),
        (lambda at: pack(at / "captioned", at / "set", rows_per_shard=0), "rows_per_shard"),
        (lambda at: pack(at / "captioned", at / "set", columns=Columns(image="x")), "no columns"),
        (lambda at: pack(at / "t.csv", at / "set"), "no column looks like the image"),
        (lambda at: pack(at / "t.csv", at / "set", columns=Columns(image="picture")), "no column 'picture'"),
        (lambda at: pack(at / "captioned", at / "theirs"), "did not write"),
    ],
)
def test_what_cannot_be_packed_is_the_users_error(captioned: Path, make: Callable, said: str) -> None:
    at = captioned.parent
    (at / "empty").mkdir()
    (at / "theirs").mkdir()
    (at / "theirs" / "00000.tar").write_bytes(b"theirs")
    (at / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=said):
        make(at)
    assert (at / "theirs" / "00000.tar").read_bytes() == b"theirs"


def test_labels_are_all_numbers_or_all_names(captioned: Path, tmp_path: Path) -> None:
    (captioned / "00.json").write_text('{"label": 3}')
    (captioned / "01.json").write_text('{"label": "cat"}')
    with pytest.raises(UserError, match="partly numbers"):
        pack(captioned, tmp_path / "set")


def test_counts_by_reason_are_those_of_the_sidecars(captioned: Path, tmp_path: Path) -> None:
    done = pack(captioned, tmp_path / "set", workers=1)
    manifest = read_manifest(tmp_path / "set")
    table = read_sidecar(manifest.sidecar_path(manifest.shards[0]))
    assert count_reasons(table) == dict(sorted(done.rejected.items()))
    assert packed_rows(table).num_rows == done.packed == manifest.samples
