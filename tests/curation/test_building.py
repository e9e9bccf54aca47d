"""Recipes: every stage once, whatever was killed between; the waterfall accounts for every row."""

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from curation_sets import all_rows, encoded, files, photo

from data_pipeline.curation.recipes import load_recipe, recipe_path
from data_pipeline.format import read_manifest
from data_pipeline.preparation import verify
from launch.cli import run

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs/recipes").glob("*.yaml"))


@pytest.fixture
def recipe(make_set: Callable[..., Path], tmp_path: Path) -> Path:
    """Two sources: a folder of 16 images, of which one is none and two are copies, and a set of 6 foreign shards."""
    images = tmp_path / "images"
    images.mkdir()
    for n in range(16):
        data = encoded(photo(n % 14, (96, 80) if n % 5 else (40, 40)))
        (images / f"{n:02d}.jpg").write_bytes(b"no image" if n == 7 else data)
        (images / f"{n:02d}.txt").write_text(f"picture number {n}")
    old = make_set("old", [encoded(photo(n)) for n in range(10, 22)], rows_per_shard=2)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for tar in old.glob("*.tar"):
        tar.rename(foreign / tar.name)
    held = make_set("held", [encoded(photo(n)) for n in (1, 20)])
    (tmp_path / "list.txt").write_text("https://old.invalid/3\n")
    content = {
        "sources": [
            {"name": "mine", "pack": str(images), "rows_per_shard": 4},
            {"name": "theirs", "set": str(foreign)},
        ],
        "filter": {"rules": {"min_side": 50}},
        "takedown": {"list": str(tmp_path / "list.txt"), "erase": True},
        "dedup": {"rules": {"near": True}, "against": [str(held)]},
        "shards": {"samples_per_shard": 5, "shuffle": 3},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def waterfall(told: str) -> list[tuple[str, int, int, bool]]:
    return [(step["stage"], step["rows"], step["left"], step["skipped"]) for step in json.loads(told)["waterfall"]]


def test_a_recipe_runs_through_and_is_skipped_then(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["shards", "build", str(recipe), str(tmp_path / "out"), "--workers", "1", "--json"]
    assert run(words) == 0
    first = waterfall(capsys.readouterr().out)
    # Of mine: 7 is none, 0, 5, 10 and 15 are small (14 and 15 are 0 and 1 again, 15 and 10 small), 1 is held out.
    assert first[:4] == [
        ("source mine", 16, 15, False),
        ("source theirs", 12, 12, False),
        ("filter mine", 15, 11, False),
        ("filter theirs", 12, 12, False),
    ]
    stages = [step[0] for step in first]
    assert stages[4:] == ["takedown", "dedup", "shards", "verify"]
    for (_, _, left, _), (_, rows, _, _) in itertools.pairwise(first[4:]):
        assert rows == left
    final = tmp_path / "out/shards"
    kept = [row for row in all_rows(final) if row["status"] == "packed"]
    assert len(kept) == first[-1][2] == read_manifest(final).samples and verify(final).sound
    assert len(all_rows(final)) == 28, "every input row is accounted for"
    before = files(tmp_path / "out")
    assert run(words) == 0
    again = waterfall(capsys.readouterr().out)
    assert again == [(*step[:3], True) for step in first] and files(tmp_path / "out") == before


def test_other_options_of_a_stage_that_decided_are_refused(recipe: Path, tmp_path: Path, capsys) -> None:
    words = ["shards", "build", str(recipe), str(tmp_path / "out"), "--workers", "1"]
    assert run(words) == 0
    assert run([*words, "verify.decode=true"]) == 0, "a check decides nothing"
    capsys.readouterr()
    assert run([*words, "filter.rules.min_side=60"]) == 2
    assert "stage 'filter mine'" in capsys.readouterr().err


def test_a_mistake_that_decided_nothing_can_be_corrected(recipe: Path, tmp_path: Path, capsys) -> None:
    """In a source as in a filter; no set is decided about before the rules can be tried on every set."""
    words = ["shards", "build", str(recipe), str(tmp_path / "out"), "--workers", "1"]
    assert run([*words, f"sources.0.pack={tmp_path / 'nowhere'}"]) == 2
    assert run([*words, "filter.rules.expressions=['caption < 5']"]) == 2
    assert "cannot be evaluated" in capsys.readouterr().err
    made = all_rows(tmp_path / "out/sources/mine")
    pq.write_table(pa.table({"key": [row["key"] for row in made]} | {"s": [0.0] * len(made)}), tmp_path / "s.parquet")
    of_one = [f"filter.scores={{mine: {tmp_path / 's.parquet'}}}", "filter.rules.expressions=['s > 0.5']"]
    assert run([*words, *of_one]) == 2, "the other set has no such column"
    assert all_rows(tmp_path / "out/sources/mine") == made
    assert run(words) == 0
    assert run([*words, "filter.rules.min_side=60"]) == 2, "now it has decided"


def test_what_later_stages_need_is_looked_for_first(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["shards", "build", str(recipe), str(tmp_path / "out"), "--workers", "1"]
    for change in ("takedown.list=gone.txt", "dedup.against=[gone.txt]", "filter.scores={mine: gone.txt}"):
        assert run([*words, change]) == 2
        assert "gone.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_build_that_is_killed_ends_like_one_that_is_not(recipe: Path, tmp_path: Path, kills: int) -> None:
    def attempt(output: Path, seconds: float | None) -> bool:
        child = os.fork()
        if child == 0:
            os._exit(run(["shards", "build", str(recipe), str(output), "--workers", "1", "--json"]))
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return not os.WIFSIGNALED(status)

    foreign, spare = tmp_path / "foreign", tmp_path / "spare"
    shutil.copytree(foreign, spare)  # erasing zeroes bytes of the shards themselves
    begun, rng = time.monotonic(), random.Random(3)
    assert attempt(tmp_path / "whole", None)
    seconds = time.monotonic() - begun
    wanted = {name: data for name, data in files(tmp_path / "whole").items() if name != "build.json"}
    killed = rounds = 0
    while killed < kills:
        output = tmp_path / f"broken-{rounds}" / "whole"  # manifests hold the folder's name
        output.parent.mkdir()
        for tar in spare.iterdir():
            shutil.copy(tar, foreign / tar.name)
        for _ in range(3):
            killed += not attempt(output, rng.uniform(0, seconds))
        attempt(output, None)
        found = {name: data for name, data in files(output).items() if name != "build.json"}
        different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        assert not different, f"after {killed} kills"
        rounds += 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_say_how_they_are_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe_path(path.stem) == path and load_recipe(path).sources
    assert f"internimage shards build {path.stem} " in path.read_text()
    assert run(["shards", "build", path.stem, "nowhere", "--forecast", "1000000", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["rows"] == 1_000_000 >= told["images"] >= told["samples"] > 0 < told["hours"]
    assert told["fetched_tb"] * 1e9 == pytest.approx(told["images"] * load_recipe(path).forecast.fetched_kb)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sources.0.fetch=also.tsv", "give one of fetch, pack and set"),
        ("filter.rules.min_sides=3", "filter.rules"),
        ("sources.1.name=mine", "two sources have one name"),
        ("nothing.at.all=1", "nothing"),
        ("sources.7.name=x", "has no place"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_with_its_key(
    recipe: Path, tmp_path: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["shards", "build", str(recipe), str(tmp_path / "out"), change]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
