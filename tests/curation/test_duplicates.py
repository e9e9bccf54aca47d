"""Copies: all exact ones are found, near ones as a brute-force comparison by the reference hash finds them."""

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pdqhash
import pyarrow as pa
import pytest
from curation_sets import all_rows, encoded, files, photo
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.curation.decisions import SetPath
from data_pipeline.curation.duplicates import DuplicateRules, dedup_sets, settle
from data_pipeline.curation.filters import FilterRules, filter_set
from data_pipeline.curation.undropping import undrop
from data_pipeline.durable import file_lock
from data_pipeline.errors import UserError
from data_pipeline.format import read_manifest, read_sidecar, write_sidecar
from data_pipeline.preparation import pack, verify
from launch.cli import run


def reasons(folder: Path) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in all_rows(folder) if row["status"] == "dropped"}


def test_all_exact_copies_go_and_the_first_stays(make_set: Callable[..., Path]) -> None:
    images = [encoded(photo(n)) for n in (0, 1, 0, 2, 1, 0)] + [None, b"no image", b"no image"]
    folder = make_set("web", images, rows_per_shard=2)
    done = dedup_sets([SetPath(folder)], DuplicateRules())
    assert (done.rows, done.exact, done.near, done.left) == (6, 3, 0, 3)
    expected = {"000010000": "000000000", "000020000": "000000001", "000020001": "000000000"}
    assert reasons(folder) == {gone: f"duplicate of web/{kept}" for gone, kept in expected.items()}
    assert verify(folder).sound and "pdq" not in all_rows(folder)[0]
    before = files(folder)
    assert dedup_sets([SetPath(folder)], DuplicateRules()).exact == 0 and files(folder) == before


def test_copies_across_sets_and_of_held_out_sets(make_set: Callable[..., Path]) -> None:
    one = make_set("one", [encoded(photo(n)) for n in range(6)])
    two = make_set("two", [encoded(photo(n)) for n in (3, 9, 5, 8)])
    held = make_set("held", [encoded(photo(n)) for n in (5, 8, 8)])
    before = files(held)
    done = dedup_sets([SetPath(one), SetPath(two)], DuplicateRules(), against=[SetPath(held)])
    assert reasons(one) == {"000000005": "duplicate of held/000000000"}
    assert reasons(two) == {
        "000000000": "duplicate of one/000000003",
        "000000002": "duplicate of held/000000000",
        "000000003": "duplicate of held/000000001",
    }
    assert done.leaked == {"held": {"one": 1, "two": 2}} and done.dropped == {"one": 1, "two": 3}
    assert files(held) == before, "a held-out set never changes"
    assert [step["dropped"] for step in read_manifest(two).history] == [3]


def test_a_held_out_set_may_be_read_only_and_share_a_name(make_set: Callable[..., Path], tmp_path: Path) -> None:
    web = make_set("train", [encoded(photo(n)) for n in range(3)])
    (tmp_path / "held").mkdir()
    held = make_set("other", [encoded(photo(1))]).rename(tmp_path / "held" / "train")
    (held / "manifest.json").write_text((held / "manifest.json").read_text().replace('"other"', '"train"'))
    before = files(tmp_path / "held") | {str(path): b"" for path in held.iterdir()}
    done = dedup_sets([SetPath(web)], DuplicateRules(), against=[SetPath(held)])
    assert done.leaked == {"train": {"train-1": 1}}
    assert files(tmp_path / "held") | {str(path): b"" for path in held.iterdir()} == before, "not even a lock"


@pytest.mark.parametrize(("keep", "stays"), [("first", 0), ("largest", 2), ("longest_caption", 1)])
def test_the_rule_says_which_copy_stays(make_set: Callable[..., Path], keep: str, stays: int) -> None:
    sizes, captions = [(160, 128), (320, 256), (480, 384), (480, 384)], ["a", "a long caption", "b", None]
    images = [encoded(photo(4, (480, 384)).resize(size, Image.Resampling.LANCZOS)) for size in sizes]
    folder = make_set("web", images, captions=captions)
    dedup_sets([SetPath(folder)], DuplicateRules(near=True, keep=keep), workers=1)
    assert [row["status"] for row in all_rows(folder)].index("packed") == stays
    assert len(reasons(folder)) == 3


def test_near_copies_are_those_of_a_brute_force_comparison(make_set: Callable[..., Path]) -> None:
    """Random blends of two pictures give hashes at all distances. Every row that stays is far from all others that
    stay (up to the recall that is stated), and every row that goes is near the one that its reason names."""
    shots = []
    for n in range(90):
        blend = Image.blend(photo(n // 6), photo(100 + n), 0.05 * (n % 6))
        shots.append(encoded(blend, quality=95))
    folder = make_set("web", shots, rows_per_shard=16)
    done = dedup_sets([SetPath(folder)], DuplicateRules(near=True), workers=1)
    hashes = {}
    for row, shot in zip(all_rows(folder), shots, strict=True):
        with Image.open(io.BytesIO(shot)) as image:
            hashes[row["key"]] = pdqhash.compute(np.array(image.convert("RGB")))[0]
    gone = reasons(folder)
    for key, reason in gone.items():
        kept = reason.split("web/")[1].split(",")[0]
        apart = int((hashes[key] != hashes[kept]).sum())
        assert apart <= 31 and reason.endswith(f", {apart} bits") and kept not in gone
    missed = [
        int((hashes[a] != hashes[b]).sum())
        for a, b in itertools.combinations(sorted(set(hashes) - set(gone)), 2)
        if int((hashes[a] != hashes[b]).sum()) <= 31
    ]
    assert 20 <= done.near == len(gone) and len(missed) <= 0.15 * len(gone)
    assert all(apart > 15 for apart in missed), "the bands find all pairs of 15 bits or less"


@given(st.data())
def test_what_goes_is_near_what_stays(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=30))
    pairs = sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})
    fixed = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    better, worse = (np.array([pair[side] for pair in pairs], dtype=np.intp) for side in (0, 1))
    distances = np.array([hash(pair) % 32 for pair in pairs], dtype=np.int32)
    keepers, nearest = settle(count, better, worse, distances, fixed)
    stays = {n for n in range(count) if keepers[n] < 0}
    near = dict(zip(pairs, distances.tolist(), strict=True))
    for n in range(count):
        choices = {low: near[low, n] for low in stays if (low, n) in near}
        if n in stays:
            assert not choices or fixed[n]
        else:
            assert nearest[n] == choices[int(keepers[n])] == min(choices.values()) and not fixed[n]


@pytest.mark.parametrize("made_by", ["this version", "one that hashed used rows alone"])
def test_rows_that_come_back_are_compared_too(make_set: Callable[..., Path], made_by: str) -> None:
    shots = [encoded(photo(1), quality=quality) for quality in (95, 90, 85, 80)] + [encoded(photo(2))]
    folder = make_set("web", shots, captions=["three whole words", "two words", "one", "three more words", "a b c"])
    filter_set(folder, FilterRules(min_words=3))
    assert dedup_sets([SetPath(folder)], DuplicateRules(near=True), workers=1, dry_run=True).near == 1
    if made_by != "this version":
        for path in folder.glob("*.parquet"):
            rows = read_sidecar(path)
            kept = [row if row["status"] == "packed" else row | {"pdq": None, "pdq_quality": None}
                    for row in rows.to_pylist()]  # fmt: skip
            write_sidecar(path, pa.Table.from_pylist(kept, schema=rows.schema))
    undrop(SetPath(folder), ["filter*"])
    done = dedup_sets([SetPath(folder)], DuplicateRules(near=True), workers=1)
    assert (done.near, done.without_hash) == (3, 0)


def test_a_retried_image_is_compared_with_the_hashed_ones(tmp_path: Path) -> None:
    for n, quality in ((0, 95), (1, 90)):
        (tmp_path / f"{n}.jpg").write_bytes(encoded(photo(1), quality=quality))
    (tmp_path / "2.jpg").write_bytes(encoded(photo(3)))
    (tmp_path / "t.csv").write_text("image\n0.jpg\n1.jpg\n2.jpg\n")
    moved = (tmp_path / "1.jpg").rename(tmp_path / "later.jpg")
    pack(tmp_path / "t.csv", tmp_path / "set", workers=1)
    assert dedup_sets([SetPath(tmp_path / "set")], DuplicateRules(near=True), workers=1).near == 0
    moved.rename(tmp_path / "1.jpg")
    pack(tmp_path / "t.csv", tmp_path / "set", workers=1, retry=["image_missing"])
    assert dedup_sets([SetPath(tmp_path / "set")], DuplicateRules(near=True), workers=1).near == 1
    assert [row["status"] for row in all_rows(tmp_path / "set")] == ["packed", "dropped", "packed"]


def test_plain_images_are_no_copies_of_each_other(make_set: Callable[..., Path]) -> None:
    folder = make_set("plain", [encoded(Image.new("RGB", (64, 64), colour)) for colour in ("red", "blue", "white")])
    done = dedup_sets([SetPath(folder)], DuplicateRules(near=True), workers=1)
    assert (done.near, done.without_hash, done.left) == (0, 3, 3)


def test_a_dry_run_shows_pairs_and_drops_nothing(make_set: Callable[..., Path], tmp_path: Path, capsys) -> None:
    folder = make_set("web", [encoded(photo(n % 3)) for n in range(6)])
    before = files(folder)
    page = tmp_path / "pairs.html"
    assert run(["shards", "dedup", str(folder), "--dry-run", "--preview", str(page), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["exact"], told["left"], told["applied"]) == (3, 3, False)
    assert files(folder) == before and page.read_text().count("<img") == 6


def test_a_set_named_twice_or_being_written_is_refused(make_set: Callable[..., Path]) -> None:
    folder = make_set("web", [encoded(photo(0))])
    with pytest.raises(UserError, match="named twice"):
        dedup_sets([SetPath(folder)], DuplicateRules(), against=[SetPath(folder)])
    with file_lock(folder / ".lock"), pytest.raises(UserError, match="another run is writing"):
        dedup_sets([SetPath(folder)], DuplicateRules())
