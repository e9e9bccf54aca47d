"""Sidecars parsed once a node: the same answers as parsing them each time, whatever happens to the files."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from data_pipeline.format import sidecar
from data_pipeline.reading.storage import columns
from data_pipeline.reading.storage.columns import evict, read_columns, shared_columns


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "00000.parquet", 50)


def write(path: Path, count: int, caption: str = "caption") -> Path:
    rows = [
        {
            "row": n, "status": ["packed", "packed", "rejected", "dropped"][n % 4], "key": f"{n:09d}",
            "reason": ["", "end_marker_added", "timeout", "duplicate of x"][n % 4] if n != 40 else "text_missing",
            "sha256": None if n % 8 == 1 else f"{n:064x}", "caption": None if n % 5 == 0 else f"{caption} {n} 猫",
            "label": None if n % 3 else n, "image_offset": 512 * n, "image_size": n + 1,
            "text_offset": 7 if n % 2 else None, "text_size": 3 if n % 2 else None,
        }
        for n in range(count)
    ]  # fmt: skip
    sidecar.write_sidecar(path, sidecar.table(rows))
    return path


def seen(found: columns.SlotColumns) -> list[tuple]:
    parts = (found.key, found.caption, found.note, found.dropped, found.label, found.digest)
    return [
        (*(part(row) for part in parts), found.place("image", row), found.place("text", row))
        for row in range(len(found))
    ]


def test_slots_are_the_sidecars_rows_in_order(path: Path) -> None:
    slots = [row for row in sidecar.read_sidecar(path).to_pylist() if row["status"] != "rejected"]
    found = seen(read_columns(path, ("text",)))
    assert found == [
        (
            row["key"], row["caption"], "" if row["reason"] == "end_marker_added" else row["reason"],
            row["reason"] if row["status"] == "dropped" else None, row["label"],
            None if row["sha256"] is None else bytes.fromhex(row["sha256"]), (row["image_offset"], row["image_size"]),
            (-1 if row["text_offset"] is None else 7, -1 if row["text_size"] is None else 3),
        )
        for row in slots
    ]  # fmt: skip
    assert read_columns(path, ()).place("text", 0) == (-1, -1)


def test_the_second_process_parses_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "columns"
    first = seen(shared_columns(path, ("text",), folder))
    monkeypatch.setattr(columns, "read_columns", lambda *_: pytest.fail("parsed again"))
    assert seen(shared_columns(path, ("text",), folder)) == first
    with open(path, "rb") as file:
        assert seen(shared_columns(file, ("text",), folder)) == first
    assert folder.stat().st_mode & 0o077 == 0


def test_a_sidecar_that_changed_is_parsed_again(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "columns"
    shared_columns(path, (), folder)
    write(path, 50, "another")  # replaced whole, as every writer does: another inode
    assert "another" in shared_columns(path, (), folder).caption(1)
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    shared_columns(path, (), folder)
    assert len(list(folder.glob("*.arrow"))) == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_damaged_columns_are_made_anew(damage: str, path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "columns"
    expected = seen(shared_columns(path, (), folder))
    (kept,) = folder.glob("*.arrow")
    kept.write_bytes({"cut": kept.read_bytes()[:-100], "empty": b"", "noise": b"x" * 5000}[damage])
    assert seen(shared_columns(path, (), folder)) == expected
    assert seen(shared_columns(path, (), folder)) == expected


def test_a_folder_that_is_not_ours_or_cannot_be_written_shares_nothing(path: Path, tmp_path: Path) -> None:
    expected = seen(read_columns(path, ()))
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert seen(shared_columns(path, (), open_to_all)) == expected and not list(open_to_all.iterdir())
    assert seen(shared_columns(path, (), path / "no" / "folder")) == expected
    assert seen(shared_columns(path, (), None)) == expected


def test_the_folder_is_bounded_by_last_use(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.arrow").write_bytes(bytes(1000))
        os.utime(tmp_path / f"{number}.arrow", (number, number))
    os.utime(tmp_path / "0.arrow", (99, 99))
    evict(tmp_path, 3000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.arrow", "4.arrow", "5.arrow"]


def test_processes_that_come_together_agree(path: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from data_pipeline.reading.storage.columns import shared_columns\n"
        "found = shared_columns(Path(sys.argv[1]), (), Path(sys.argv[2]))\n"
        "print(len(found), found.caption(1))"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "columns")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert {process.communicate(timeout=300)[0] for process in running} == {"38 caption 1 猫\n"}
    assert [one.name for one in (tmp_path / "columns").iterdir() if one.suffix != ".arrow"] == []


def test_five_samples_of_a_large_shard_cost_no_parsing(tmp_path: Path) -> None:
    path, folder = write(tmp_path / "00000.parquet", 10_000), tmp_path / "columns"
    shared_columns(path, (), folder)

    def cost(once: object) -> float:
        started = time.process_time()
        for _ in range(20):
            found = once()
            for row in range(0, 5000, 1000):
                found.key(row), found.caption(row), found.note(row), found.dropped(row), found.digest(row)
        return time.process_time() - started

    shared, parsed = cost(lambda: shared_columns(path, (), folder)), cost(lambda: read_columns(path, ()))
    assert shared < parsed / 4
    assert isinstance(shared_columns(path, (), folder).table, pa.Table)
