"""index, verify and stats: what they find is what is there, and what they miss is nothing."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import BadDataError, UserError
from data_pipeline.format import read_manifest, read_sidecar, write_sidecar
from data_pipeline.preparation import index, pack, stats, verify
from data_pipeline.preparation.statistics import Histogram, Repeats

SAMPLE = Path(__file__).parents[2].parent / "shared" / "data" / "cc12m-sample.tar"


@pytest.fixture
def packed(captioned: Path, tmp_path: Path) -> Path:
    pack(captioned, tmp_path / "set", rows_per_shard=5, workers=1)
    return tmp_path / "set"


def problems(folder: Path, **options) -> dict[tuple[str, str], str]:
    found = verify(folder, **options)
    assert found.sound == (found.problem_count == 0) and found.problem_count == len(found.problems)
    return {(problem.shard, problem.key): problem.what for problem in found.problems}


def test_a_sound_set_has_no_problems(packed: Path) -> None:
    told: list[tuple[int, int]] = []
    found = verify(packed, decode=True, progress=lambda *now: told.append(now))
    assert (found.sound, found.shards, found.samples, found.problems) == (True, 3, 8, ())
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("at", [-5000, 700, 1030])
def test_one_changed_byte_is_found(packed: Path, at: int) -> None:
    path = packed / "00000.tar"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert "sha256" in problems(packed)["00000.tar", ""]


def test_each_kind_of_damage_is_named_with_its_place(packed: Path) -> None:
    manifest = read_manifest(packed)
    rows = read_sidecar(packed / "00000.parquet")
    row = rows.to_pylist()[1]

    data = bytearray((packed / "00000.tar").read_bytes())
    data[row["image_offset"] + row["image_size"] // 2] ^= 0xFF
    (packed / "00000.tar").write_bytes(data)
    found = problems(packed)
    assert "image has another sha256" in found["00000.tar", row["key"]]
    assert set(found) == {("00000.tar", ""), ("00000.tar", row["key"])}

    moved = rows.to_pylist()
    moved[2]["text_offset"] += 512
    moved[3]["caption"] = "another"
    moved[4]["width"] = 1
    write_sidecar(packed / "00001.parquet", rows)
    write_sidecar(packed / "00000.parquet", rows.from_pylist(moved, schema=rows.schema))
    (packed / "00002.tar").unlink()
    found = problems(packed)
    assert "lies elsewhere" in found["00000.tar", moved[2]["key"]]
    assert "caption differs" in found["00000.tar", moved[3]["key"]]
    assert "another size" in found["00000.tar", moved[4]["key"]]
    assert "cannot be read" in found["00002.tar", ""]
    assert "not in the shard" in found["00001.tar", rows["key"][0].as_py()]
    assert "not in the sidecar" in found["00001.tar", "000010000"]
    assert f"manifest says {manifest.shards[1].samples}" in found["00001.tar", ""]

    short = verify(packed, kept=2)
    assert len(short.problems) == 2 < short.problem_count


def test_a_cut_shard_and_a_lost_sidecar_are_problems_not_errors(packed: Path) -> None:
    data = (packed / "00000.tar").read_bytes()
    (packed / "00000.tar").write_bytes(data[:-3000])
    (packed / "00001.parquet").unlink()
    found = problems(packed)
    assert "bytes, the manifest says" in found["00000.tar", ""] and "missing" in found["00001.tar", ""]
    (packed / "manifest.json").unlink()
    with pytest.raises(UserError):
        verify(packed)


def test_an_image_that_cannot_be_decoded_is_found_where_asked(
    tmp_path: Path, picture: Callable, encode: Callable
) -> None:
    from data_pipeline.format import ShardEntry, ShardWriter, index_shard, write_manifest

    image = encode(picture(0))
    with ShardWriter(tmp_path / "00000.tar") as shard:
        shard.add("0", {"jpg": image})
        shard.add("1", {"jpg": image[: len(image) // 2]})
    write_sidecar(tmp_path / "00000.parquet", index_shard(tmp_path / "00000.tar"))
    entry = ShardEntry("00000.tar", "00000.parquet", 2, shard.bytes, shard.sha256)
    write_manifest(tmp_path, name="x", shards=[entry])
    assert problems(tmp_path) == {}
    assert list(problems(tmp_path, decode=True)) == [("00000.tar", "1")]


def test_stats_count_what_the_sidecars_say(packed: Path, captioned: Path) -> None:
    found = stats(packed)
    assert (found.rows, found.packed, found.captions, found.labelled) == (12, 8, 8, 0)
    assert found.rows == found.packed + sum(found.rejected.values())
    assert found.rejected["image_truncated"] == 1 and found.formats == {"jpeg": 8}
    assert (found.width.smallest, found.width.largest, found.height.median) == (40, 40, 30)
    assert found.caption_words.median == 3 and found.caption_characters.largest == len("picture number 7")
    assert found.duplicate_images == 0 and found.labels == {}
    assert found.bytes == sum(path.stat().st_size for path in packed.glob("*.tar"))
    assert found.image_bytes.largest == max((captioned / f"{n:02d}.jpg").stat().st_size for n in range(8))


def test_stats_name_labels_and_count_duplicates(tmp_path: Path, picture: Callable, encode: Callable) -> None:
    for name in ("cat/1", "cat/2", "dog/1"):
        path = tmp_path / "pets" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(int(name[-1]))))
    pack(tmp_path / "pets", tmp_path / "set", workers=1)
    found = stats(tmp_path / "set")
    assert found.labels == {"cat": 2, "dog": 1} and found.labelled == 3 and found.captions == 0
    assert found.duplicate_images == 1 and found.caption_words.largest == 0


def test_index_makes_foreign_shards_a_set(packed: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for path in packed.glob("*.tar"):
        shutil.copy(path, foreign)
    cut = read_sidecar(packed / "00001.parquet")["image_offset"][1].as_py() + 100
    (foreign / "00001.tar").write_bytes((packed / "00001.tar").read_bytes()[:cut])
    found = index(foreign)
    assert (found.shards, found.samples) == (3, 6)
    assert found.rejected == Counter({"truncated_member": 1, "empty_shard": 1})
    assert verify(foreign).sound and stats(foreign).rejected == found.rejected
    again = index(foreign, force=True)
    assert again == found
    elsewhere = index(packed, index_folder=tmp_path / "elsewhere")
    assert elsewhere.samples == 8 and (tmp_path / "elsewhere" / "manifest.json").exists()
    assert verify(packed, index_folder=tmp_path / "elsewhere").sound


def test_index_leaves_a_set_of_ours_as_it_is_unless_forced(packed: Path) -> None:
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    assert index(packed).samples == 8
    after = {path.name: path.read_bytes() for path in packed.iterdir()}
    assert {name: after[name] for name in before} == before
    index(packed, force=True)
    manifest = read_manifest(packed)
    assert manifest.samples == 8 and manifest.shards[0].sidecar == "00000.index.parquet"


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"{SAMPLE} is not here")
def test_the_cc12m_sample_is_sound(tmp_path: Path) -> None:
    assert index(SAMPLE.parent, index_folder=tmp_path).samples == 32
    assert verify(SAMPLE.parent, index_folder=tmp_path, decode=True).sound
    found = stats(SAMPLE.parent, index_folder=tmp_path)
    assert (found.packed, found.captions, found.formats, found.rejected) == (32, 32, {"jpeg": 32}, {})


def test_a_damaged_manifest_is_said(packed: Path) -> None:
    content = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_text(json.dumps(content | {"samples": 1}))
    for look in (verify, stats):
        with pytest.raises(BadDataError):
            look(packed)


def test_workers_find_what_one_process_finds(packed: Path, captioned: Path, tmp_path: Path) -> None:
    data = bytearray((packed / "00001.tar").read_bytes())
    data[2000] ^= 1
    (packed / "00001.tar").write_bytes(data)
    assert verify(packed, workers=2) == verify(packed) and not verify(packed).sound
    assert stats(packed, workers=2) == stats(packed)
    folders = tmp_path / "1", tmp_path / "2"
    alone, together = (
        index(packed, index_folder=folder, force=True, workers=n + 1) for n, folder in enumerate(folders)
    )
    assert replace(alone, manifest=together.manifest) == together


@given(st.lists(st.integers(0, 10**9), max_size=300), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_histograms_are_numpys_percentiles(values: list[int], parts: int) -> None:
    whole = Histogram()
    for part in range(parts):
        one = Histogram()
        one.add(np.array(values[part::parts], np.int64))
        whole.merge(one)
    found = whole.spread()
    expected = np.percentile(values, (0, 10, 50, 90, 100)) if values else np.zeros(5)
    assert np.allclose([found.smallest, found.p10, found.median, found.p90, found.largest], expected)


def test_histograms_of_many_values_keep_three_digits_in_bounded_memory() -> None:
    values, whole = np.random.default_rng(0).integers(1, 10**8, 400_000), Histogram()
    for part in np.split(values, 40):
        whole.add(part)
    assert len(whole._counts) < 70_000
    found = whole.spread()
    exact = np.percentile(values, (10, 50, 90))
    assert np.allclose([found.p10, found.median, found.p90], exact, rtol=0.01)
    assert (found.smallest, found.largest) == (values.min(), values.max())


@pytest.mark.parametrize("held", [1, 100, 1 << 22])
def test_repeats_are_counted_in_memory_or_on_disk(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.preparation.statistics._HELD", held)
    digests = np.random.default_rng(0).integers(0, 2**64, 500, dtype=np.uint64)
    digests = np.concatenate(
        [digests, digests[:100], digests[:7], np.zeros(3, np.uint64), np.full(2, 2**64 - 1, np.uint64)]
    )
    with Repeats() as repeats:
        for part in np.array_split(digests, 9):
            repeats.add(part)
        assert repeats.count() == 100 + 7 + 2 + 1
