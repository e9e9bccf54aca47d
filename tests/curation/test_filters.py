"""Filters: the right rows go, for the first rule that refuses them; nothing else changes."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation_sets import all_rows, encoded, files, photo

from data_pipeline.curation.filters import FilterRules, filter_set
from data_pipeline.errors import UserError
from data_pipeline.format import read_manifest
from data_pipeline.preparation import pack, verify
from launch.cli import run
from launch.commands.shards import filter as filter_command

CAPTIONS = [
    "a dog on a beach",
    "ok",
    "собака",
    "a dog, twice!",
    "犬がいる",
    None,
    "café 12",
    "a  b\tc",
    "x" * 300,
    "tail",
]
SIZES = [(96, 80), (40, 90), (96, 80), (200, 20), (96, 80), (96, 80), (64, 64), (30, 30), (96, 80), (96, 80)]
URLS = [
    "https://good.org/1", "http://Bad.org/2", "https://img.bad.org:8080/3", "https://notbad.org/4",
    "https://user@bad.org/5", None, "https://good.org/bad.org", "ftp://good.org", "bad.org/9", "https://bad.org?x=10",
]  # fmt: skip


@pytest.fixture
def mixed(make_set: Callable[..., Path]) -> Path:
    images = [encoded(photo(n, size)) for n, size in enumerate(SIZES)]
    return make_set("mixed", images, captions=CAPTIONS, urls=URLS, rows_per_shard=4)


def status(folder: Path) -> list[tuple[str, str]]:
    return [(row["status"], row["reason"]) for row in all_rows(folder)]


RULES: list[tuple[dict[str, Any], Callable[[int], bool]]] = [
    ({"min_side": 40}, lambda n: min(SIZES[n]) >= 40),
    ({"max_aspect": 2.0}, lambda n: max(SIZES[n]) / min(SIZES[n]) <= 2),
    ({"min_characters": 5}, lambda n: len(CAPTIONS[n] or "") >= 5),
    ({"max_characters": 200}, lambda n: CAPTIONS[n] is not None and len(CAPTIONS[n]) <= 200),
    ({"min_words": 3}, lambda n: len((CAPTIONS[n] or "").split()) >= 3),
    ({"scripts": ("latin",)}, lambda n: n in (0, 1, 3, 6, 7, 8, 9)),
    ({"scripts": ("ascii",)}, lambda n: CAPTIONS[n] is not None and CAPTIONS[n].isascii()),
    ({"scripts": ("cyrillic", "han", "hiragana")}, lambda n: n in (2, 4)),
    ({"domains": ("bad.org",)}, lambda n: n in (0, 3, 6, 7, 8)),  # one without an URL goes: nobody knows its domain
    ({"expressions": ("even=row % 2 == 0",)}, lambda n: n % 2 == 0),
    ({"expressions": ("width == 96",)}, lambda n: SIZES[n][0] == 96),
    ({"min_characters": 5, "keep_unknown": True}, lambda n: CAPTIONS[n] is None or len(CAPTIONS[n]) >= 5),
]


@pytest.mark.parametrize(("rules", "stays"), RULES, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_rule_drops_exactly_the_rows_it_refuses(mixed: Path, rules: dict[str, Any], stays: Callable) -> None:
    done = filter_set(mixed, FilterRules(**rules))
    kept = [n for n, (found, _) in enumerate(status(mixed)) if found == "packed"]
    assert kept == [n for n in range(10) if stays(n)] and done.left == len(kept)
    assert verify(mixed).sound


def test_the_first_rule_that_refuses_is_the_reason(mixed: Path) -> None:
    rules = FilterRules(min_side=40, min_words=3, expressions=("row > 0",))
    done = filter_set(mixed, rules)
    assert [(fall.rule, fall.rows, fall.dropped, fall.unknown, fall.left, fall.alone) for fall in done.waterfall] == [
        ("min_side", 10, 2, 0, 8, 2),
        ("min_words", 8, 7, 1, 1, 7),
        ("row > 0", 1, 1, 0, 0, 1),
    ]
    assert status(mixed)[0] == ("dropped", "filter: row > 0") and status(mixed)[3] == ("dropped", "filter: min_side")
    assert status(mixed)[5] == ("dropped", "filter: min_words (unknown)")
    (step,) = read_manifest(mixed).history
    assert step["options"] == {"min_side": 40, "min_words": 3, "expressions": ["row > 0"]}
    assert step["dropped"] == {"min_side": 2, "min_words": 7, "row > 0": 1}
    before = files(mixed)
    assert filter_set(mixed, rules).dropped == 0 and files(mixed) == before, "once more changes nothing"


def test_a_dry_run_shows_both_sides_and_changes_nothing(mixed: Path, tmp_path: Path) -> None:
    before = files(mixed)
    page = tmp_path / "page.html"
    code = run(["shards", "filter", str(mixed), "--min-side", "40", "--dry-run", "--preview", str(page)])
    assert code == 0 and files(mixed) == before
    stay, go = page.read_text().split("<h2>go")
    assert (stay.count("<img"), go.count("<img")) == (8, 2) and go.count("filter: min_side") == 2
    assert not re.search(r'(src|href)="(?!data:)', page.read_text()), "the page needs nothing besides itself"


@pytest.mark.parametrize("by", ["key", "sha256", "url"])
def test_scores_made_elsewhere_are_joined(mixed: Path, tmp_path: Path, by: str) -> None:
    scored = [row for row in all_rows(mixed) if row[by] is not None][1:]
    similarity = [0.1 * n for n in range(len(scored))]
    pq.write_table(pa.table({by: [row[by] for row in scored], "similarity": similarity}), tmp_path / "s.parquet")
    done = filter_set(mixed, FilterRules(min_similarity=0.25), scores=tmp_path / "s.parquet")
    expected = {row["key"] for row, score in zip(scored, similarity, strict=True) if score >= 0.25}
    assert {row["key"] for row in all_rows(mixed) if row["status"] == "packed"} == expected
    assert done.waterfall[0].unknown == 10 - len(scored)
    assert read_manifest(mixed).history[0]["scores"]["name"] == "s.parquet"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"key": ["000000000", "000000000"], "similarity": [1.0, 2.0]}, "two rows of one key"),
        ({"name": ["a", "b"], "similarity": [1.0, 2.0]}, "no column key, sha256 or url"),
        ({"key": ["000000000", "000000001"], "caption": ["a", "b"]}, "columns caption already"),
    ],
)
def test_scores_that_cannot_be_joined_are_refused(
    mixed: Path, tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "s.parquet")
    before = files(mixed)
    with pytest.raises(UserError, match=message):
        filter_set(mixed, FilterRules(min_similarity=0.5), scores=tmp_path / "s.parquet")
    assert files(mixed) == before


@pytest.mark.parametrize(
    "expression",
    [
        "blur < 3",
        "width",
        "1; drop view rows",
        "(select count(*) from read_text('/etc/hostname')) > 0",
        "width > ",
        "caption::int > 3",
    ],
)
def test_an_expression_that_is_none_is_refused_by_name(
    mixed: Path, expression: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(mixed)
    assert run(["shards", "filter", str(mixed), "--where", f"mine={expression}"]) == 2
    assert "mine" in (told := capsys.readouterr().err) or "rules cannot be evaluated" in told
    assert files(mixed) == before


@pytest.mark.parametrize("text", ["watermark=false", "Watermark=true", "words=watermark", "watermrk= False"])
def test_a_name_that_may_be_a_comparison_is_refused(mixed: Path, tmp_path: Path, text: str) -> None:
    marks = pa.table({"key": [row["key"] for row in all_rows(mixed)], "watermark": [n == 3 for n in range(10)]})
    pq.write_table(marks, tmp_path / "s.parquet")
    before = files(mixed)
    with pytest.raises(UserError, match="to compare a column"):
        filter_set(mixed, FilterRules(expressions=(text,)), scores=tmp_path / "s.parquet")
    assert files(mixed) == before
    for same in ("watermark == false", "watermark = false", "clean=watermark=false", "watermark=WATERMARK = false"):
        done = filter_set(mixed, FilterRules(expressions=(same,)), scores=tmp_path / "s.parquet", dry_run=True)
        assert done.dropped == 1


def test_the_command_line_prints_the_waterfall(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--min-words", "2", "--without-domain", "good.org", "--where", "mine=row < 9", "--json"]
    assert run(["shards", "filter", str(mixed), *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [fall["rule"] for fall in told["waterfall"]] == ["min_words", "domains", "mine"]
    assert told["rows"] == told["left"] + told["dropped"]


@pytest.fixture
def textual(tmp_path: Path) -> Path:
    """A set of a CSV, whose further columns are text."""
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(encoded(photo(n)))
    rows = "".join(f"{n}.png,picture {n},{score}\n" for n, score in enumerate(["0.1", "0.28", "0.9", "none"]))
    (tmp_path / "t.csv").write_text("image,caption,similarity\n" + rows)
    pack(tmp_path / "t.csv", tmp_path / "textual", workers=1)
    return tmp_path / "textual"


def test_min_similarity_reads_numbers_of_a_text_column(textual: Path) -> None:
    filter_set(textual, FilterRules(min_similarity=0.28))
    assert [reason for _, reason in status(textual)] == [
        "filter: min_similarity", "", "", "filter: min_similarity (unknown)",
    ]  # fmt: skip


def test_a_text_column_beside_a_number_is_told_how_to_cast(textual: Path) -> None:
    for condition in ("similarity >= 0.28", "similarity::DOUBLE >= 0.28"):
        with pytest.raises(UserError, match=r"try_cast\(NAME as double\)"):
            filter_set(textual, FilterRules(expressions=(condition,)))


def test_the_example_of_the_help_works_on_a_text_column(textual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(textual.parent)
    words = shlex.split(filter_command.EXAMPLE)[1:]
    assert run([str(textual) if word == "shards/web" else word for word in words]) == 0
