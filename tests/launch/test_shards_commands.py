"""`internimage shards ...`: arguments arrive where the work is done, and verdicts leave as exit codes."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from launch.cli import run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (80 + number, 60), (number, 0, 0)).save(folder / f"{number}.jpg")
    (folder / "table.csv").write_text("file,words\n0.jpg,zero\n1.jpg,one\nmissing.jpg,none\n2.jpg,two\n")
    return folder


@pytest.fixture
def server(pictures: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(pictures))
    ) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def pack(pictures: Path, output: Path) -> int:
    words = ["--image-column", "file", "--caption-column", "words", "--shorter-side", "50", "--rows-per-shard", "2"]
    return run(["shards", "pack", str(pictures / "table.csv"), str(output), *words, "--json"])


def test_a_table_is_packed_verified_and_described(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(pictures, tmp_path / "set") == 0
    packed = json.loads(capsys.readouterr().out)
    assert (packed["rows"], packed["packed"], packed["shards"]) == (4, 3, 2)
    assert run(["shards", "verify", str(tmp_path / "set"), "--decode", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sound"] is True
    assert run(["shards", "stats", str(tmp_path / "set"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["captions"] == 3
    assert described["height"]["largest"] == 50


def test_a_damaged_set_is_told_by_exit_code_3(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(pictures, tmp_path / "set") == 0
    shard = tmp_path / "set" / "00000.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[700] ^= 1
    shard.write_bytes(damaged)
    capsys.readouterr()
    assert run(["shards", "verify", str(tmp_path / "set")]) == 3
    assert "00000.tar" in capsys.readouterr().out


def test_foreign_shards_are_indexed_elsewhere(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(pictures, tmp_path / "set") == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (tmp_path / "set" / "00000.tar").rename(foreign / "00000.tar")
    capsys.readouterr()
    assert run(["shards", "index", str(foreign), "--index-folder", str(tmp_path / "index"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 2
    assert [path.name for path in foreign.iterdir()] == ["00000.tar"]


def test_urls_are_fetched_with_a_status_for_every_row(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "urls.txt").write_text(f"{server}/0.jpg\n{server}/nothing.jpg\n{server}/2.jpg\n")
    words = ["shards", "fetch", str(tmp_path / "urls.txt"), str(tmp_path / "web"), "--attempts", "1", "--json"]
    assert run([*words, "--private-network", "127.0.0.0/8"]) == 0
    fetched = json.loads(capsys.readouterr().out)
    assert (fetched["packed"], fetched["rejected"]) == (2, {"http_404": 1})


def test_a_missing_table_or_class_list_is_a_mistake(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["shards", "pack", str(tmp_path / "nothing.csv"), str(tmp_path / "set")]) == 2
    assert (
        run(["shards", "pack", str(pictures), str(tmp_path / "set"), "--classes", str(tmp_path / "nothing.txt")]) == 2
    )
    assert "--classes" in capsys.readouterr().err
