"""Pages for people: they show what is there, and need nothing besides themselves."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from curation_sets import encoded, photo

from data_pipeline.curation.decisions import SetPath
from data_pipeline.curation.duplicates import DuplicateRules, dedup_sets
from launch.cli import run


@pytest.fixture
def folder(make_set: Callable[..., Path]) -> Path:
    captions = ["<script>alert(1)</script>", "собака", "犬", None, "five words are in here", "b", "c", "d"]
    held = make_set("held", [encoded(photo(40))])
    images = [encoded(photo(n)) for n in (0, 1, 2, 3, 0, 1, 40)] + [b"no image"]
    web = make_set("web", images, captions=captions)
    dedup_sets([SetPath(web)], DuplicateRules(), against=[SetPath(held)])
    return web


def alone(page: Path) -> str:
    text = page.read_text()
    assert not re.search(r'(src|href)="?(?!"?data:)\w', text) and "<script>" not in text
    return text


def test_a_sheet_groups_rows_by_reason(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "p.html"
    assert run(["shards", "show", str(folder), "--page", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": str(page), "rows": 8, "shown": 8}
    text = alone(page)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == ["dropped: duplicate (3 shown)", "packed (4 shown)", "rejected: not_an_image (1 shown)"]
    assert "&lt;script&gt;" in text and text.count("no picture") == 1


def test_copies_stand_beside_their_originals(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    words = ["--status", "dropped", "--reason", "duplicate*", "--page", str(page)]
    assert run(["shards", "show", str(folder), *words]) == 0
    text = alone(page)
    pairs = re.findall(r'<div class="pair">(.*?)</div>(?=<div|<figure|</div>)', text)
    assert len(pairs) == 2 and text.count("<img") == 5, "the third original is in another set"
    for pair in pairs:
        first, second = re.findall(r'src="(.*?)"', pair)
        assert first == second
    assert run(["shards", "show", str(folder), *words, "--other", str(folder.parent / "held")]) == 0
    assert alone(page).count("<img") == 6


def test_a_condition_chooses_and_a_bad_one_is_refused(folder: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "p.html"
    assert run(["shards", "show", str(folder), "--where", "words >= 5", "--page", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1
    assert run(["shards", "show", str(folder), "--where", "beauty > 3", "--page", str(page)]) == 2
    assert "beauty" in capsys.readouterr().err


def test_the_page_of_statistics_counts_what_is_there(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "s.html"
    assert run(["shards", "stats", str(folder), "--page", str(page), "--json"]) == 0
    text = alone(page)
    assert "8 rows, 4 used, 1 shards" in text

    def counts(title: str) -> dict[str, int]:
        table = re.search(rf"<h2>{re.escape(html.escape(title))}</h2><table>(.*?)</table>", text)[1]
        return {name: int(count) for name, count in re.findall(r"<tr><td>(.*?)<td>(\d+)<td", table)}

    assert counts("Status") == {"packed": 4, "dropped": 3, "rejected": 1}
    assert counts("Reasons") == {"duplicate": 3, "not_an_image": 1}
    assert counts("Script of the caption's first letter") == {"Latin": 1, "Cyrillic": 1, "Han": 1}
    assert counts("Domains") == {"web.invalid": 4} and sum(counts("Shorter side, pixels").values()) == 4
