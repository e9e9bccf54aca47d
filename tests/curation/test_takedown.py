"""Takedown: what a list names goes for good; nothing else does, and nobody asks for it again."""

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from curation_sets import all_rows, encoded, files, member, photo

from data_pipeline.curation.decisions import SetPath
from data_pipeline.curation.filters import FilterRules, filter_set
from data_pipeline.curation.takedown import read_list, take_down
from data_pipeline.curation.undropping import undrop
from data_pipeline.errors import UserError
from data_pipeline.format import open_set, read_manifest
from data_pipeline.format.pdq import pdq
from data_pipeline.preparation import WebRules, fetch, pack, stats, verify
from launch.cli import run

URLS = ["https://a.org/1", "https://www.a.org/2", "https://nota.org/3", "https://b.org/4", "https://B.org/4", None]


@pytest.fixture
def folder(make_set: Callable[..., Path]) -> Path:
    return make_set("web", [encoded(photo(n, (200, 160))) for n in range(6)], urls=URLS, rows_per_shard=4)


def matched(folder: Path, tmp_path: Path, *entries: str, **options: object) -> list[int]:
    """The rows that a list drops."""
    (tmp_path / "list.txt").write_text("# requests\n\n" + "\n".join(entries) + "\n")
    take_down([SetPath(folder)], tmp_path / "list.txt", workers=1, **options)
    return [n for n, row in enumerate(all_rows(folder)) if row["status"] != "packed"]


def test_each_kind_of_entry_takes_what_it_names(folder: Path, tmp_path: Path) -> None:
    rows = all_rows(folder)
    assert matched(folder, tmp_path, "https://b.org/4") == [3], "URLs are compared as they stand"
    assert matched(folder, tmp_path, "domain:A.org") == [0, 1, 3]
    assert matched(folder, tmp_path, f"sha256:{rows[5]['sha256'].upper()}") == [0, 1, 3, 5]
    looks_like = pdq(np.array(photo(2, (400, 320)))).bits
    assert matched(folder, tmp_path, f"pdq:{looks_like}") == [0, 1, 2, 3, 5]
    reasons = [row["reason"] for row in all_rows(folder)]
    assert reasons == [
        f"taken_down: {kind}" if kind else "" for kind in ("domain", "domain", "pdq", "url", "", "sha256")
    ]
    assert verify(folder).sound and len(read_manifest(folder).history) == 4


def test_erasing_zeroes_now_and_once_more_changes_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("domain:a.org\n")
    first = take_down([SetPath(folder)], tmp_path / "list.txt")
    assert (first.dropped, first.erased, first.matched["domain"]) == (2, 0, 2)
    again = take_down([SetPath(folder)], tmp_path / "list.txt", erase=True)
    assert (again.dropped, again.erased) == (0, 2), "what was dropped can still be erased"
    found = read_manifest(folder)
    for n, row in enumerate(all_rows(folder)):
        assert (set(member(found, row)) == {0}) == (n < 2) == (row["status"] == "erased")
    assert stats(folder).dropped == {"taken_down: domain": 2} and verify(folder, decode=True).sound
    before = files(folder)
    assert take_down([SetPath(folder)], tmp_path / "list.txt", erase=True).erased == 0 and files(folder) == before


@pytest.fixture
def away(tmp_path: Path) -> Path:
    """A set of which the tars lie at a URL."""
    for n in range(4):
        (tmp_path / f"{n}.jpg").write_bytes(encoded(photo(n)))
    (tmp_path / "t.csv").write_text("image,url\n" + "".join(f"{n}.jpg,https://a.org/{n}\n" for n in range(4)))
    command = ["pack", str(tmp_path / "t.csv"), str(tmp_path / "set"), "--rows-per-shard", "2", "--workers", "1"]
    assert run(["shards", *command, "--tars-to", f"file://{tmp_path}/bucket"]) == 0
    return tmp_path / "set"


def test_erasing_what_lies_elsewhere_claims_nothing(away: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "list.txt").write_text("https://a.org/1\n")
    before = files(away)
    for command in (
        ["takedown", str(tmp_path / "list.txt"), str(away), "--erase"],
        ["dedup", str(away), "--near", "--workers", "1"],
        ["reshard", str(away), str(tmp_path / "new")],
    ):
        assert run(["shards", *command]) == 2
        assert "00000.tar" in (told := capsys.readouterr().err) and "--tars-to" in told
        assert files(away) == before
    (away / "00000.tar").symlink_to(tmp_path)  # there, and cannot be written: root may write to all files
    assert run(["shards", "takedown", str(tmp_path / "list.txt"), str(away), "--erase"]) == 2
    (away / "00000.tar").unlink()
    (away / "00000.tar").write_bytes((tmp_path / "bucket/00000.tar").read_bytes())  # as the error says
    assert take_down([SetPath(away)], tmp_path / "list.txt", erase=True).erased == 1
    assert run(["shards", "publish", str(away), f"file://{tmp_path}/bucket"]) == 0
    assert verify(tmp_path / "bucket", decode=True).sound
    (row,) = [row for row in all_rows(tmp_path / "bucket") if row["status"] == "erased"]
    assert set(member(read_manifest(tmp_path / "bucket"), row)) == {0}


def test_an_erasure_whose_tar_goes_meanwhile_can_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text("https://b.org/4\n")
    monkeypatch.setattr("data_pipeline.curation.decisions._carry_out", lambda *_: (folder / "00000.tar").unlink())
    tar = (folder / "00000.tar").read_bytes()
    take_down([SetPath(folder)], tmp_path / "list.txt", erase=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"00000.tar.* back into the folder"):
        take_down([SetPath(folder)], tmp_path / "list.txt", erase=True)
    assert "erased" not in [row["status"] for row in all_rows(folder)]
    (folder / "00000.tar").write_bytes(tar)
    take_down([SetPath(folder)], tmp_path / "list.txt", erase=True)
    assert [row["status"] for row in all_rows(folder)].index("erased") == 3 and verify(folder).sound


def test_rules_can_be_tried_on_a_set_whose_tars_lie_elsewhere(away: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run(["shards", "filter", str(away), "--where", "row > 0", "--dry-run", "--preview", str(page)]) == 0
    assert page.read_text().count("no picture") == 4


class Killed(BaseException):
    pass


def die(at: int) -> Callable[[int, int], None]:
    """A progress callback that ends a run of `pack` when `at` rows are prepared."""

    def step(done: int, total: int) -> None:
        if done >= at:
            raise Killed

    return step


def test_an_unfinished_set_is_refused_until_it_is_finished(tmp_path: Path) -> None:
    for n in range(6):
        (tmp_path / f"{n}.jpg").write_bytes(encoded(photo(n)))
    (tmp_path / "t.csv").write_text("image,url\n" + "".join(f"{n}.jpg,https://a.org/{n}\n" for n in range(6)))
    (tmp_path / "list.txt").write_text("https://a.org/1\n")
    with pytest.raises(Killed):
        pack(tmp_path / "t.csv", tmp_path / "set", rows_per_shard=2, workers=1, progress=die(6))
    before = files(tmp_path / "set")
    assert "00001.tar" in before
    for command in (["takedown", str(tmp_path / "list.txt"), str(tmp_path / "set")], ["index", str(tmp_path / "set")]):
        assert run(["shards", *command]) == 2
    with pytest.raises(UserError, match="unfinished set"):
        open_set(tmp_path / "set", tmp_path / "elsewhere")
    assert files(tmp_path / "set") == before, "no decision goes where packing would not see it"
    pack(tmp_path / "t.csv", tmp_path / "set", rows_per_shard=2, workers=1)
    assert take_down([SetPath(tmp_path / "set")], tmp_path / "list.txt").dropped == 1


def test_what_was_taken_down_stays_so_in_a_killed_retry(tmp_path: Path) -> None:
    for n in (0, 2, 4):
        (tmp_path / f"{n}.jpg").write_bytes(encoded(photo(n)))
    (tmp_path / "t.csv").write_text("image,url\n" + "".join(f"{n}.jpg,https://a.org/{n}\n" for n in range(6)))
    (tmp_path / "list.txt").write_text("https://a.org/0\n")
    options = {"rows_per_shard": 2, "workers": 1}
    pack(tmp_path / "t.csv", tmp_path / "set", **options)
    take_down([SetPath(tmp_path / "set")], tmp_path / "list.txt")
    for n in (1, 3, 5):
        (tmp_path / f"{n}.jpg").write_bytes(encoded(photo(n)))
    with pytest.raises(Killed):
        pack(tmp_path / "t.csv", tmp_path / "set", retry=["image_missing"], **options, progress=die(6))
    assert not (tmp_path / "set/manifest.json").exists()
    with pytest.raises(UserError, match="unfinished set"):
        open_set(tmp_path / "set")
    pack(tmp_path / "t.csv", tmp_path / "set", retry=["image_missing"], **options)
    statuses = ["dropped", *["packed"] * 5]
    assert [row["status"] for row in all_rows(tmp_path / "set")] == statuses
    (tmp_path / "set/manifest.json").unlink()
    assert run(["shards", "index", str(tmp_path / "set"), "--force"]) == 0
    assert [row["status"] for row in all_rows(tmp_path / "set")] == statuses, "nor does an index bring it back"


def test_a_dry_run_counts_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("domain:a.org\nhttps://nowhere.org/\n")
    before = files(folder)
    assert run(["shards", "takedown", str(tmp_path / "list.txt"), str(folder), "--erase", "--dry-run"]) == 0
    assert files(folder) == before


@pytest.mark.parametrize("line", ["a.org", "sha256:12", "pdq:xyz", "domain:", "md5:" + "0" * 64, "url:"])
def test_a_line_that_names_nothing_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "list.txt").write_text(f"https://fine.org/\n{line}\n")
    with pytest.raises(UserError, match=r"list\.txt, line 2"):
        read_list(tmp_path / "list.txt")


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A site with pictures /0 to /3 once `open` stands in the list of what was asked; before, it is out of order."""
    asked: list[str] = []

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/robots.txt":
                self.send_error(404)
                return
            asked.append(self.path)
            broken = "open" not in asked and self.path in ("/1", "/2")
            body = encoded(photo(int(self.path[1:])))
            self.send_response(503 if broken else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_no_retry_asks_again_for_what_was_taken_down(server: tuple[str, list[str]], tmp_path: Path) -> None:
    site, asked = server
    (tmp_path / "urls.txt").write_text("\n".join(f"{site}/{n}" for n in range(4)) + "\n")
    web = WebRules(private_networks=("127.0.0.0/8",), attempts=1)

    def run_fetch(*retry: str) -> list[tuple[str, str]]:
        fetch(tmp_path / "urls.txt", tmp_path / "set", web=web, retry=retry, workers=1)
        return [(row["status"], row["reason"]) for row in all_rows(tmp_path / "set")]

    assert run_fetch() == [("packed", ""), ("rejected", "http_503"), ("rejected", "http_503"), ("packed", "")]
    (tmp_path / "list.txt").write_text(f"{site}/1\n{site}/3\n")
    done = take_down([SetPath(tmp_path / "set")], tmp_path / "list.txt", erase=True)
    assert (done.tombstones, done.erased) == (1, 1)
    history = read_manifest(tmp_path / "set").history
    asked[:] = ["open"]
    after = run_fetch("*")
    assert asked == ["open", "/2"], "only the row that nobody objects to is asked for"
    assert after == [("packed", ""), ("rejected", "taken_down: url"), ("packed", ""), ("rejected", "taken_down: url")]
    assert read_manifest(tmp_path / "set").history == history and verify(tmp_path / "set").sound


def test_a_drop_is_taken_back_and_a_takedown_is_not(folder: Path, tmp_path: Path) -> None:
    before = files(folder)
    filter_set(folder, FilterRules(expressions=("odd=row % 2 = 0",)))
    filter_set(folder, FilterRules(expressions=("four=row <> 4",)))
    assert matched(folder, tmp_path, "domain:a.org") == [0, 1, 3, 4, 5]
    rows = all_rows(folder)
    assert run(["shards", "undrop", str(folder), "filter: nothing*"]) == 2 and all_rows(folder) == rows
    told = undrop(SetPath(folder), ["filter: *"], dry_run=True)
    assert (told.undropped, told.reasons, told.left_out) == (3, {"filter: odd": 2, "filter: four": 1}, 2)
    assert all_rows(folder) == rows and undrop(SetPath(folder), ["filter: odd"]).undropped == 2
    assert [row["status"] for row in all_rows(folder)] == ["dropped"] * 2 + ["packed"] * 2 + ["dropped", "packed"]
    assert run(["shards", "undrop", str(folder), "*"]) == 0 and verify(folder, decode=True).sound
    assert [row["status"] for row in all_rows(folder)] == ["dropped"] * 2 + ["packed"] * 4
    assert [step["what"] for step in read_manifest(folder).history] == ["filter"] * 2 + ["takedown"] + ["undrop"] * 2
    untouched = {name: data for name, data in files(folder).items() if name in before and name.endswith(".tar")}
    assert untouched == {name: data for name, data in before.items() if name.endswith(".tar")}
