"""PDQ hashes are the reference implementation's, bit for bit."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pdqhash
import pytest
from curation_sets import all_rows, encoded, member, photo
from PIL import Image

from data_pipeline.curation.bands import choose_bands, expected_recall
from data_pipeline.curation.decisions import SetPath
from data_pipeline.curation.fingerprints import add_hashes, hash_image
from data_pipeline.curation.takedown import take_down
from data_pipeline.format import ShardWriter, open_set
from data_pipeline.format.pdq import pdq
from data_pipeline.preparation import ImageRules, index, pack
from data_pipeline.preparation.fetching.spill import Spill
from data_pipeline.preparation.packing.rows import with_data
from data_pipeline.preparation.packing.samples import Sample

CC12M = Path(__file__).resolve().parents[2].parent / "shared/data/cc12m-sample.tar"
SIZES = [(300, 217), (96, 80), (512, 512), (511, 3), (64, 64), (130, 129), (1, 1), (40, 512), (4, 90), (5, 5)]


def reference(pixels: np.ndarray) -> tuple[str, int]:
    """By Facebook's own code; its vector begins with the last bit."""
    bits, quality = pdqhash.compute(np.ascontiguousarray(pixels))
    return np.packbits(bits.astype(bool)).tobytes().hex(), quality


def distance(left: str, right: str) -> int:
    return (int(left, 16) ^ int(right, 16)).bit_count()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_hashes_equal_the_reference_of_any_size(size: tuple[int, int]) -> None:
    pixels = np.array(photo(7, size))
    assert tuple(pdq(pixels)) == reference(pixels)


def test_hashes_of_photographs_equal_the_reference() -> None:
    if not CC12M.is_file():
        pytest.skip("the CC12M sample (../shared/data/cc12m-sample.tar) is not there")
    with tarfile.open(CC12M) as archive:
        images = [archive.extractfile(name).read() for name in archive.getnames() if name.endswith(".jpg")]
    for data in images:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.array(image.convert("RGB"))
        wanted, quality = reference(pixels)
        found = hash_image(data)
        assert found == (wanted, quality)


def test_a_large_image_is_shrunk_first_and_differs_in_few_bits() -> None:
    image = photo(3, (3000, 2200))
    assert distance(hash_image(encoded(image))[0], reference(np.array(image))[0]) <= 10


def test_a_plain_image_has_no_quality_and_a_broken_one_no_hash() -> None:
    assert hash_image(encoded(Image.new("RGB", (64, 64), "red")))[1] == 0
    assert hash_image(b"nothing") is None and hash_image(encoded(photo(1))[:100]) is None


def test_every_pair_of_15_bits_or_less_shares_a_band() -> None:
    bands = choose_bands(10_000)
    assert len(bands) == 16 and expected_recall(bands, 15) == 1.0
    assert expected_recall(bands, 0) == 1.0 and 0.88 < expected_recall(bands, 31) < 0.94
    large = choose_bands(400_000_000)
    assert len(large) == 48 and {len(band) for band in large} == {2}
    used = np.bincount(np.array(large).ravel(), minlength=16)
    assert used.min() == used.max() == 6
    assert expected_recall(choose_bands(400_000_000, 120), 24) > 0.9


def test_packing_hashes_what_it_packs_where_asked(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, kind in enumerate(("JPEG", "PNG", "GIF", "JPEG")):
        data = encoded(photo(number, (200, 160)), kind)
        (tmp_path / f"images/{number}.jpg").write_bytes(data if number < 3 else data[:200])
    for name, rules in (("kept", ImageRules(pdq=True)), ("shrunk", ImageRules(shorter_side=80, pdq=True))):
        pack(tmp_path / "images", tmp_path / name, rules=rules, rows_per_shard=3, workers=1)
        found, rows = open_set(tmp_path / name), all_rows(tmp_path / name)
        assert "pdq" not in rows[3] and rows[3]["status"] == "rejected"  # the shard of that one has no image to hash
        for row in rows[:3]:
            wanted, quality = reference(np.array(Image.open(io.BytesIO(member(found, row))).convert("RGB")))
            stays = name == "kept" and row["row"] < 2
            assert distance(row["pdq"], wanted) <= (0 if stays else 16), "encoding flips a few bits"
            assert abs(row["pdq_quality"] - quality) <= 5
        assert add_hashes(found, workers=1) == 1, "curation has only the other shard to do"


def test_an_image_that_cannot_be_decoded_is_tried_once(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "0.tar") as shard:
        shard.add("a", {"jpg": encoded(photo(1))})
        shard.add("b", {"jpg": encoded(photo(2))[:400]})
    assert [add_hashes(open_set(tmp_path), workers=1) for _ in range(2)] == [1, 0]
    whole, broken = all_rows(tmp_path)
    assert whole["pdq"] and (broken["status"], broken["pdq"], broken["pdq_quality"]) == ("packed", None, 0)


def test_a_shard_indexed_anew_is_hashed_anew(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "0.tar") as shard:
        for n in range(3):
            shard.add(f"{n}", {"jpg": encoded(photo(n))})
    add_hashes(open_set(tmp_path), workers=1)
    hashes = [row["pdq"] for row in all_rows(tmp_path)]
    (tmp_path / "list.txt").write_text(f"sha256:{all_rows(tmp_path)[1]['sha256']}\n")
    take_down([SetPath(tmp_path)], tmp_path / "list.txt", erase=True)
    index(tmp_path, force=True)
    assert [row["pdq"] for row in all_rows(tmp_path)] == [None, hashes[1], None]
    assert add_hashes(open_set(tmp_path), workers=1) == 1 and [row["pdq"] for row in all_rows(tmp_path)] == hashes


def test_a_hash_outlives_the_way_over_the_disk(tmp_path: Path) -> None:
    sample = with_data(Sample(row=7), encoded(photo(1)), None, ImageRules(pdq=True))
    spill = Spill(tmp_path / "s", fresh=True)
    spill.add(sample)
    found = spill.result(Sample(row=7))
    spill.close(done=True)
    assert sample.pdq is not None and tuple(found.pdq or ()) == sample.pdq and found.image == sample.image
