"""Manifests, sidecars, the shard writer, and sets that are indexed on first use."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.durable import file_lock, remove_leftovers
from data_pipeline.errors import BadDataError, UserError
from data_pipeline.format import (
    ShardEntry,
    ShardWriter,
    index_set,
    index_shard,
    open_set,
    read_manifest,
    read_sidecar,
    write_manifest,
    write_sidecar,
)
from data_pipeline.format.sidecar import SIDECAR_SCHEMA, table

Files = dict[str, bytes]
ENTRY = ShardEntry("00000.tar", "00000.parquet", 2, 10, "ab")


def test_written_shards_are_equal_bytes_and_hold_what_was_added(tmp_path: Path) -> None:
    samples = {f"{n:09d}": {"jpg": bytes([n]) * (500 + n), "txt": b"", "json": b"{}"} for n in range(30)}
    for name in ("a.tar", "b.tar"):
        with ShardWriter(tmp_path / name) as shard:
            places = {key: shard.add(key, members) for key, members in samples.items()}
    data = (tmp_path / "a.tar").read_bytes()
    assert data == (tmp_path / "b.tar").read_bytes()
    assert (shard.samples, shard.bytes, shard.sha256) == (30, len(data), hashlib.sha256(data).hexdigest())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {m.mtime for m in tar.getmembers()} == {0}
        for key, members in samples.items():
            for extension, content in members.items():
                member = tar.getmember(f"{key}.{extension}")
                assert (member.offset_data, member.size) == places[key][extension]
                assert tar.extractfile(member).read() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a.tar") as shard:
        shard.add("0", {"jpg": b"x"})
        raise RuntimeError
    with pytest.raises(ValueError, match="dot"), ShardWriter(tmp_path / "a.tar") as shard:
        shard.add("a.b", {"jpg": b"x"})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_shard_and_its_leftovers_can_be_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from data_pipeline.format import ShardWriter\n"
        "shard = ShardWriter(pathlib.Path(sys.argv[1]) / '00000.tar'); shard.add('0', {'jpg': bytes(1 << 21)})\n"
        "os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=200, check=False)
    assert ended.returncode == -9
    assert not (tmp_path / "00000.tar").exists() and len(list(tmp_path.iterdir())) == 1
    assert remove_leftovers(tmp_path) == 1 and list(tmp_path.iterdir()) == []


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = write_manifest(tmp_path, name="mine", shards=[ENTRY], classes=["köter", "cat"], about={"license": "CC0"})
    assert written == read_manifest(str(tmp_path))
    assert (written.samples, written.classes, written.shards) == (2, ("köter", "cat"), (ENTRY,))
    assert written.shard_path(ENTRY) == tmp_path / "00000.tar" and written.about["license"] == "CC0"
    assert write_manifest(tmp_path, name="bare", shards=[]).classes is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(schema=2), "schema 2"),
        (lambda m: m.update(samples=3), "counts 3"),
        (lambda m: m.pop("shards"), "damaged"),
        (lambda m: m["shards"][0].update(name="../../etc/passwd"), "damaged"),
        (lambda m: m["shards"][0].update(sidecar=".."), "damaged"),
        (lambda m: m["shards"][0].update(samples="many"), "damaged"),
    ],
)
def test_a_damaged_manifest_is_bad_data_with_a_remedy(tmp_path: Path, change: Callable, said: str) -> None:
    write_manifest(tmp_path, name="mine", shards=[ENTRY])
    content = json.loads((tmp_path / "manifest.json").read_text())
    change(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BadDataError, match=said) as caught:
        read_manifest(tmp_path)
    assert "index" in str(caught.value) and caught.value.exit_code == 3


def test_a_missing_set_is_the_users_error_and_says_where(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        for read in (read_manifest, open_set):
            with pytest.raises(UserError, match=str(folder)) as caught:
                read(folder)
            assert caught.value.exit_code == 2


def test_a_sidecar_that_cannot_be_used_is_bad_data(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    with pytest.raises(BadDataError, match="missing"):
        read_sidecar(path)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(BadDataError, match="cannot be read"):
        read_sidecar(path)
    pq.write_table(pa.table({"url": ["x"], "key": ["0"]}), path)  # as img2dataset writes beside its shards
    with pytest.raises(BadDataError, match="no column row"):
        read_sidecar(path)
    rows = table([{"row": 0, "status": "packed", "reason": "", "key": "0"}])
    write_sidecar(path, rows.set_column(10, "image_offset", pa.array(["a"])).set_column(9, "label", pa.array(["b"])))
    with pytest.raises(BadDataError, match="label is string"):
        read_sidecar(path)
    write_sidecar(path, rows.append_column("score", pa.array([0.5])))
    assert read_sidecar(path)["score"].to_pylist() == [0.5]
    assert read_sidecar(path).select(SIDECAR_SCHEMA.names).schema == SIDECAR_SCHEMA


@pytest.fixture
def foreign(three: Files, pack_shard: Callable[..., Path], make_members: Callable[[int], Files]) -> Path:
    """Two shards of img2dataset's making, with its own Parquet files beside them."""
    pack_shard(three)
    pack_shard(make_members(7), "00001.tar")
    folder = pack_shard(b"its own", "00000.parquet").parent
    return folder


def test_foreign_shards_are_indexed_once_beside_them_without_touching_their_files(foreign: Path) -> None:
    found = open_set(foreign)
    assert (found.samples, found.classes, [e.samples for e in found.shards]) == (4, None, [3, 1])
    assert (foreign / "00000.parquet").read_bytes() == b"its own"
    assert read_sidecar(found.sidecar_path(found.shards[1]))["caption"].to_pylist() == ["picture 7"]
    times = {path: path.stat().st_mtime_ns for path in foreign.iterdir() if path.suffix != ".lock"}
    assert open_set(foreign) == found
    assert times == {path: path.stat().st_mtime_ns for path in foreign.iterdir() if path.suffix != ".lock"}


def test_the_index_may_lie_elsewhere(foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = sorted(foreign.iterdir())
    elsewhere = tmp_path_factory.mktemp("index") / "deep"
    found = open_set(foreign, elsewhere)
    assert sorted(foreign.iterdir()) == before
    assert found.folder == foreign and found.sidecar_path(found.shards[0]).parent == elsewhere
    assert read_sidecar(found.sidecar_path(found.shards[0])).num_rows == 3
    assert open_set(foreign, elsewhere) == found


def test_a_shard_that_changed_or_went_or_came_is_seen(
    foreign: Path,
    pack_shard: Callable[..., Path],
    make_members: Callable[[int], Files],
    make_archive: Callable[..., bytes],
) -> None:
    first = open_set(foreign)
    same_length = make_archive(make_members(7)).replace(b"picture 7", b"picture 9")
    path = pack_shard(same_length, "00001.tar")
    later = (foreign / "00001.index.parquet").stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    second = open_set(foreign)
    assert second.shards[0] == first.shards[0] and second.shards[1].bytes == first.shards[1].bytes
    assert read_sidecar(second.sidecar_path(second.shards[1]))["caption"].to_pylist() == ["picture 9"]
    path.unlink()
    pack_shard(make_members(3), "00002.tar")
    assert [entry.name for entry in open_set(foreign).shards] == ["00000.tar", "00002.tar"]


def test_a_lost_or_damaged_index_is_made_anew(foreign: Path) -> None:
    found = open_set(foreign)
    (foreign / "manifest.json").write_text("{")
    (foreign / "00001.index.parquet").unlink()
    with pytest.raises(BadDataError):
        open_set(foreign)  # a manifest that cannot be read may have been somebody's: the user decides
    (foreign / "manifest.json").unlink()
    assert open_set(foreign) == found


def test_class_names_survive_a_lost_manifest(
    make_picture: Callable[..., bytes], pack_shard: Callable[..., Path]
) -> None:
    fields = [{"label": 2, "label_name": "cat"}, {"label": 0, "label_name": "dog"}]
    files = {f"{n}.jpg": make_picture(n) for n in range(2)}
    files |= {f"{n}.json": json.dumps(field).encode() for n, field in enumerate(fields)}
    folder = pack_shard(files).parent
    assert open_set(folder).classes == ("dog", "1", "cat")


def test_processes_that_come_together_make_one_index(foreign: Path) -> None:
    code = (
        "import sys; from data_pipeline.format import open_set, read_sidecar\n"
        "found = open_set(sys.argv[1])\n"
        "print(found.samples, *(read_sidecar(found.sidecar_path(e)).num_rows for e in found.shards))"
    )
    command = [sys.executable, "-c", code, str(foreign)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert {process.communicate(timeout=200)[0].strip() for process in running} == {"4 3 1"}
    assert [path.name for path in foreign.iterdir() if "partial" in path.name] == []


def test_a_folder_that_cannot_take_the_index_says_what_to_do_and_a_current_index_needs_no_writing(
    foreign: Path,
) -> None:
    with pytest.raises(UserError, match="another index folder"):
        open_set(foreign, foreign / "00000.tar" / "index")
    found = open_set(foreign)
    (foreign / ".index.lock").unlink()
    (foreign / ".index.lock").mkdir()  # nobody can take this lock, nor could one on a read-only disk
    assert open_set(foreign) == found
    (foreign / "00001.index.parquet").unlink()
    with pytest.raises(UserError, match="cannot be written"):
        open_set(foreign)


def test_indexing_that_was_killed_goes_on_where_it_was(
    foreign: Path, make_picture: Callable[..., bytes], pack_shard: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = {"0.jpg": make_picture(0), "0.json": json.dumps({"label": 0, "label_name": "cat"}).encode()}
    pack_shard(labelled, "00002.tar")
    whole = open_set(foreign)

    class Killed(BaseException):
        pass

    def die(done: int, total: int) -> None:
        if done == 2 + (total == 4):
            raise Killed

    elsewhere = foreign / "elsewhere"
    pack_shard(labelled | {"1.jpg": make_picture(1)}, "00003.tar")
    with pytest.raises(Killed):
        index_set(foreign, elsewhere, progress=die)
    assert not (elsewhere / "manifest.json").exists()
    indexed: list[str] = []

    def counted(path: Path) -> pa.Table:
        indexed.append(path.name)
        return index_shard(path)

    monkeypatch.setattr("data_pipeline.format.sets.index_shard", counted)
    found = index_set(foreign, elsewhere)
    assert indexed == ["00003.tar"]
    assert found.shards[:3] == whole.shards and found.classes == ("cat",)
    (elsewhere / "manifest.json").unlink()
    pack_shard(labelled, "00003.tar")  # changed meanwhile: what was kept of it counts no more
    assert index_set(foreign, elsewhere).shards[3].samples == 1 and indexed == ["00003.tar"] * 2


def test_whoever_waits_for_an_index_or_makes_one_shows_that_it_lives(foreign: Path) -> None:
    beats: list[int] = []
    waited = threading.Event()

    def beat() -> None:
        beats.append(1)
        waited.set()

    with file_lock(foreign / ".index.lock"):
        waiting = threading.Thread(target=open_set, args=(foreign,), kwargs={"heartbeat": beat})
        waiting.start()
        assert waited.wait(20)
        assert not (foreign / "manifest.json").exists()
    before = len(beats)
    waiting.join(20)
    assert (foreign / "manifest.json").exists() and len(beats) >= before + 2  # one a shard


def test_an_index_beside_the_shards_is_used_while_it_is_current(
    foreign: Path, pack_shard: Callable[..., Path], make_members: Callable[[int], Files], tmp_path: Path
) -> None:
    beside = open_set(foreign)
    assert open_set(foreign, tmp_path / "node") == beside and not (tmp_path / "node").exists()
    pack_shard(make_members(3), "00002.tar")
    assert len(open_set(foreign, tmp_path / "node").shards) == 3
    assert len(read_manifest(foreign).shards) == 2  # theirs is left alone
