"""New sets from old ones: every byte of every used sample arrives, every other row is accounted for."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import webdataset
from curation_sets import all_rows, encoded, files, member, photo

from data_pipeline.curation.decisions import SetPath
from data_pipeline.curation.filters import FilterRules, filter_set
from data_pipeline.curation.resharding import Running, merge_sets, reshard_set
from data_pipeline.curation.takedown import take_down
from data_pipeline.errors import UserError
from data_pipeline.executors.units import Part, run_units
from data_pipeline.format import read_manifest, read_sidecar, write_sidecar
from data_pipeline.preparation import pack, stats, verify
from launch.cli import run

ROOT = Path(__file__).resolve().parents[2]
HERE = Running(workers=1)


@pytest.fixture
def filtered(make_set: Callable[..., Path]) -> Path:
    images: list[bytes | None] = [encoded(photo(n % 17), "PNG" if n % 5 == 0 else "JPEG") for n in range(30)]
    images[4] = None
    folder = make_set("web", images)
    filter_set(folder, FilterRules(expressions=("third=row % 3 > 0",)))
    return folder


def used(folder: Path) -> list[dict[str, Any]]:
    return [row for row in all_rows(folder) if row["status"] == "packed"]


def contents(folder: Path) -> list[tuple[bytes, bytes, bytes]]:
    found = read_manifest(folder)
    return [tuple(member(found, row, part) for part in ("image", "text", "json")) for row in used(folder)]


def test_used_samples_keep_their_bytes_keys_and_order(filtered: Path, tmp_path: Path) -> None:
    done = reshard_set(SetPath(filtered), tmp_path / "new", samples_per_shard=6, running=HERE)
    assert done.finished and done.samples == {"new": 19} and done.shards == 4
    assert contents(tmp_path / "new") == contents(filtered)
    names = ("key", "caption", "url", "sha256", "width", "height", "image_format")
    assert [[row[name] for name in names] for row in used(tmp_path / "new")] == [
        [row[name] for name in names] for row in used(filtered)
    ]
    assert [entry.samples for entry in read_manifest(tmp_path / "new").shards] == [6, 6, 6, 1]
    assert verify(tmp_path / "new", decode=True).sound


def test_every_input_row_is_accounted_for_with_its_origin(filtered: Path, tmp_path: Path) -> None:
    reshard_set(SetPath(filtered), tmp_path / "new", samples_per_shard=6, running=HERE)
    reshard_set(SetPath(tmp_path / "new"), tmp_path / "newer", samples_per_shard=50, running=HERE)
    old, new = all_rows(filtered), all_rows(tmp_path / "newer")
    assert [(row["from_set"], row["from_row"], row["from_key"]) for row in new] == [
        ("web", row["row"], row["key"]) for row in old
    ]
    assert [row["row"] for row in new] == list(range(30))
    assert [row["reason"] for row in new] == [row["reason"] for row in old]
    assert stats(tmp_path / "newer").rejected == {"filter: third": 10, "image_missing": 1}
    (step,) = read_manifest(tmp_path / "newer").history
    assert step["sources"][0]["history"][0]["sources"][0]["history"][0]["what"] == "filter"


def test_a_shuffle_is_that_of_its_seed_whoever_does_the_work(filtered: Path, tmp_path: Path) -> None:
    made = {}
    for name, seed, running in (("a", 1, HERE), ("b", 1, Running(workers=2)), ("c", 2, HERE)):
        folder = tmp_path / name / "new"
        reshard_set(SetPath(filtered), folder, samples_per_shard=5, shuffle=seed, running=running)
        made[name] = files(folder)
    assert made["a"] == made["b"]
    keys = {name: [row["key"] for row in used(tmp_path / name / "new")] for name in made}
    assert sorted(keys["a"]) == sorted(keys["c"]) and keys["a"] != keys["c"] != [row["key"] for row in used(filtered)]


def test_merging_joins_classes_by_name_and_keeps_keys_apart(tmp_path: Path) -> None:
    for name, classes in (("one", ("cat", "dog")), ("two", ("dog", "emu"))):
        for n in range(4):
            path = tmp_path / f"images-{name}" / classes[n % 2] / f"{n}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(photo(n + 10 * len(name + classes[1]))))
        pack(tmp_path / f"images-{name}", tmp_path / name, workers=1)
    sources = [SetPath(tmp_path / "one"), SetPath(tmp_path / "two")]
    merge_sets(sources, tmp_path / "both", running=HERE)
    found = read_manifest(tmp_path / "both")
    assert found.classes == ("cat", "dog", "emu")
    for row, old in zip(used(tmp_path / "both"), [*used(tmp_path / "one"), *used(tmp_path / "two")], strict=True):
        told = json.loads(member(found, row, "json"))
        assert (told["key"], told["label"]) == (row["key"], row["label"])
        assert found.classes[row["label"]] == told["label_name"] == row["url"].split("/")[0]
        assert row["key"] == f"{row['from_set']}-{old['key']}" and row["sha256"] == old["sha256"]
    assert verify(tmp_path / "both").sound


@pytest.mark.parametrize("by", ["sha256", "domain", "caption"])
def test_a_split_keeps_equal_values_on_one_side(make_set: Callable[..., Path], tmp_path: Path, by: str) -> None:
    count = 300
    images = [encoded(photo(n % 100, (24, 24))) for n in range(count)]
    urls = [f"https://host{n % 70}.org/{n}" for n in range(count)]
    captions = [f"caption {n % 90}" if n % 7 else None for n in range(count)]
    folder = make_set("web", images, rows_per_shard=100, urls=urls, captions=captions)
    words = ["train=3", "validation=1", "--by", by, "--samples-per-shard", "50", "--workers", "1"]
    assert run(["shards", "split", str(folder), str(tmp_path / "parts"), *words]) == 0
    sides = {name: used(tmp_path / "parts" / name) for name in ("train", "validation")}
    value = {"domain": lambda row: row["url"].split("/")[2]}.get(by, lambda row: row[by])
    train, validation = ({value(row) for row in rows} for rows in sides.values())
    assert not train & validation and len(sides["train"]) + len(sides["validation"]) == count
    assert 0.12 < len(validation) / len(train | validation) < 0.4
    assert all(verify(tmp_path / "parts" / name).sound for name in sides)


def test_webdataset_reads_the_new_shards(filtered: Path, tmp_path: Path) -> None:
    reshard_set(SetPath(filtered), tmp_path / "new", samples_per_shard=6, shuffle=0, running=HERE)
    urls = [str(path) for path in sorted((tmp_path / "new").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in used(tmp_path / "new")]
    digests = {hashlib.sha256(sample.get("jpg") or sample["png"]).hexdigest() for sample in samples}
    assert digests == {row["sha256"] for row in used(filtered)}


@pytest.fixture
def with_masks(tmp_path: Path) -> Path:
    """A foreign set, of which each sample has a class and a mask beside picture and words."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for shard in range(2):
        with tarfile.open(foreign / f"{shard}.tar", "w") as archive:
            for n in range(3):
                picture = encoded(photo(3 * shard + n))
                members = {"cls": b"1", "jpg": picture, "seg.png": b"mask %d" % n, "txt": b"words"}
                for name, data in members.items():
                    info = tarfile.TarInfo(f"{n}.{name}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return foreign


def test_foreign_members_that_no_sidecar_knows_arrive_too(with_masks: Path, tmp_path: Path) -> None:
    reshard_set(SetPath(with_masks), tmp_path / "new", samples_per_shard=4, running=HERE)
    reshard_set(SetPath(tmp_path / "new"), tmp_path / "again", samples_per_shard=1, running=HERE)
    for made in ("new", "again"):
        urls = [str(path) for path in sorted((tmp_path / made).glob("*.tar"))]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        assert [sample["seg.png"] for sample in samples] == [b"mask 0", b"mask 1", b"mask 2"] * 2
        assert [sample["__key__"] for sample in samples] == [f"foreign-{s}-{n}" for s in range(2) for n in range(3)]
        assert {sample["cls"] for sample in samples} == {b"1"} and verify(tmp_path / made).sound


def test_an_erasure_takes_members_that_no_sidecar_knows(with_masks: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(encoded(photo(4))).hexdigest()
    (tmp_path / "list.txt").write_text(f"sha256:{digest}\n")
    assert take_down([SetPath(with_masks)], tmp_path / "list.txt", erase=True, workers=1).erased == 1
    for shard, gone in ((0, None), (1, 1)):
        with tarfile.open(with_masks / f"{shard}.tar") as archive:
            found = {member.name: archive.extractfile(member).read() for member in archive.getmembers()}
        for n in range(3):
            assert found[f"{n}.seg.png"] == (b"\0" * 6 if n == gone else b"mask %d" % n)
            assert (set(found[f"{n}.jpg"]) == {0}) == (n == gone) == (found[f"{n}.cls"] == b"\0")


def test_further_columns_arrive_whatever_they_are_called(filtered: Path, tmp_path: Path) -> None:
    for n, path in enumerate(sorted(filtered.glob("*.parquet"))):
        rows = read_sidecar(path)
        rows = rows.append_column("WIDTH", pa.array([float(n)] * rows.num_rows))
        rows = rows.append_column("id", pa.array([f"{n}-{m}" for m in range(rows.num_rows)]))
        kind = pa.int32() if n % 2 else pa.int64()  # as lists of many parts have it
        write_sidecar(path, rows.append_column("rank", pa.array([n] * rows.num_rows, kind)))
    reshard_set(SetPath(filtered), tmp_path / "new", running=HERE)
    names = ("WIDTH", "id", "rank", "width")
    assert [[row[name] for name in names] for row in all_rows(tmp_path / "new")] == [
        [row[name] for name in names] for row in all_rows(filtered)
    ]
    assert filter_set(filtered, FilterRules(expressions=("id_1 like '0-%' and WIDTH_1 < 1",))).left == 4


def test_columns_named_like_places_keep_their_values(filtered: Path, tmp_path: Path) -> None:
    theirs = {"orig_size": "1234", "tz_offset": "+01:00", "image_extension": "tif", "old_label": "cat"}
    with open(tmp_path / "t.csv", "w") as table:
        table.write(",".join(["image", "caption", *theirs, "annotation_size", "pdq"]) + "\n")
        for n in range(3):
            (tmp_path / f"{n}.jpg").write_bytes(encoded(photo(n)))
            table.write(",".join([f"{n}.jpg" if n else "gone.jpg", "words", *theirs.values(), "small", "no"]) + "\n")
    pack(tmp_path / "t.csv", tmp_path / "old", workers=1)
    theirs |= {"input_annotation_size": "small", "input_pdq": "no"}
    merge_sets([SetPath(tmp_path / "old"), SetPath(filtered)], tmp_path / "both", running=HERE)
    rows = [row for row in all_rows(tmp_path / "both") if row["from_set"] == "old"]
    assert [row["status"] for row in rows] == ["rejected", "packed", "packed"]
    assert [{name: row[name] for name in theirs} for row in rows] == [theirs] * 3
    assert verify(tmp_path / "both", decode=True).sound


def test_damaged_bytes_are_not_copied_in_silence(filtered: Path, tmp_path: Path) -> None:
    row = used(filtered)[2]
    with open(filtered / row["shard"], "r+b") as file:
        file.seek(row["image_offset"] + 40)
        file.write(b"damage")
    reshard_set(SetPath(filtered), tmp_path / "new", running=HERE)
    damaged = [found for found in all_rows(tmp_path / "new") if found["reason"] == "image_damaged"]
    assert [found["from_key"] for found in damaged] == [row["key"]] and damaged[0]["status"] == "rejected"
    assert verify(tmp_path / "new").sound


def test_parts_in_any_order_make_the_set(filtered: Path, tmp_path: Path) -> None:
    reshard_set(SetPath(filtered), tmp_path / "a/new", samples_per_shard=3, running=HERE)
    told = []
    for index in (2, 0, 1):
        running = Running(Part(index, 3), workers=1)
        told.append(reshard_set(SetPath(filtered), tmp_path / "b/new", samples_per_shard=3, running=running).finished)
    assert told == [False, False, True] and files(tmp_path / "b/new") == files(tmp_path / "a/new")


def test_other_options_or_sources_are_refused(filtered: Path, tmp_path: Path) -> None:
    reshard_set(SetPath(filtered), tmp_path / "new", samples_per_shard=3, running=Running(Part(0, 3), workers=1))
    with pytest.raises(UserError, match="options"):
        reshard_set(SetPath(filtered), tmp_path / "new", samples_per_shard=4, running=HERE)
    filter_set(filtered, FilterRules(expressions=("row > 3",)))
    with pytest.raises(UserError, match="input"):
        reshard_set(SetPath(filtered), tmp_path / "new", samples_per_shard=3, running=HERE)
    with pytest.raises(UserError, match="one of the sources"):
        reshard_set(SetPath(filtered), filtered)
    assert run(["shards", "split", str(filtered), str(tmp_path / "s"), "a=0.5"]) == 2
    assert run(["shards", "split", str(filtered), str(tmp_path / "s"), "a=x", "b=1"]) == 2
    assert run(["shards", "split", str(filtered), str(tmp_path / "s"), "a=1", "b=1", "--by", "nothing"]) == 2


def start(filtered: Path, output: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "launch", "shards", "reshard", str(filtered), str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    more = ["--samples-per-shard", "1", "--workers", "1", *words]
    return subprocess.Popen(
        [*command, *more], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_several_tasks_share_the_work_and_one_may_die(filtered: Path, tmp_path: Path) -> None:
    reshard_set(SetPath(filtered), tmp_path / "a/new", samples_per_shard=1, running=HERE)
    tasks = [start(filtered, tmp_path / "b/new") for _ in range(3)]
    while not list((tmp_path / "b/new").glob("*.tar")) and tasks[0].poll() is None:
        time.sleep(0.01)
    tasks[0].send_signal(signal.SIGKILL)
    ends = [task.wait(120) for task in tasks]
    assert ends[1:] == [0, 0], [task.stderr.read() for task in tasks]
    reshard_set(SetPath(filtered), tmp_path / "b/new", samples_per_shard=1, running=HERE)  # if the dead one was last
    assert files(tmp_path / "b/new") == files(tmp_path / "a/new")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_ends_a_task_behind_a_shard_with_75(filtered: Path, tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "new"
    task = start(filtered, output)
    while not list(output.glob("*.tar")) and task.poll() is None:
        time.sleep(0.005)
    task.send_signal(number)
    assert task.wait(120) in (75, 0)
    if task.returncode == 75:
        assert "same command goes on" in task.stderr.read() and not list(output.glob("*.partial"))
        assert Counter(path.suffix for path in output.glob("0*"))[".tar"] < 19
    reshard_set(SetPath(filtered), output, samples_per_shard=1, running=HERE)
    assert verify(output).sound and contents(output) == contents(filtered)


def test_sigterm_to_all_processes_ends_a_task_with_75(filtered: Path, tmp_path: Path) -> None:
    task = start(filtered, tmp_path / "new", "--workers", "2")
    while not list((tmp_path / "new").glob("*.tar")) and task.poll() is None:
        time.sleep(0.005)
    os.killpg(task.pid, signal.SIGTERM)
    assert task.wait(120) in (75, 0), task.stderr.read()


def test_a_task_may_find_the_work_finished_and_cleared_up(tmp_path: Path) -> None:
    done: set[int] = set()

    def work(number: int) -> None:
        done.update(range(3))  # as if others had done the rest, and the last of them had cleared up
        shutil.rmtree(tmp_path / ".units")

    assert run_units(work, tmp_path, 3, done.__contains__, workers=1)


def test_a_missing_file_in_the_work_itself_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        run_units(lambda number: (tmp_path / "gone").read_bytes() and None, tmp_path, 1, lambda _: False, workers=1)


@pytest.mark.parametrize(("text", "units"), [("1/3", [0, 1]), ("2/3", [2, 3]), ("3/3", [4, 5, 6]), ("1/1", range(7))])
def test_parts_are_runs_of_neighbours(text: str, units: list[int]) -> None:
    assert list(Part.parse(text).units(7)) == list(units)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3"])
def test_parts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected I/N"):
        Part.parse(text)
