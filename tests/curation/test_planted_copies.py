"""Copies planted among real pictures: exact ones are all found, near ones at stated rates, by other oracles."""

import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from curation_sets import all_rows, encoded
from PIL import Image

from data_pipeline.curation.decisions import SetPath
from data_pipeline.curation.duplicates import DuplicateRules, dedup_sets
from data_pipeline.preparation.sources.emoji_drawings import drawings

CC12M = Path(__file__).resolve().parents[2].parent / "shared/data/cc12m-sample.tar"


SIDE = 384  # of a drawing, pixels


def cut(image: Image.Image) -> Image.Image:
    """1 % off each edge."""
    width, height = image.size
    left, top = max(1, round(width / 100)), max(1, round(height / 100))
    return image.crop((left, top, width - left, height - top))


WAYS: dict[str, Callable[[Image.Image], bytes]] = {
    "exact": encoded,
    "resized": lambda image: encoded(image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)),
    "recompressed": lambda image: encoded(image, quality=40),
    "another format": lambda image: encoded(image, "WEBP", quality=70),
    "cut": lambda image: encoded(cut(image)),
}


def real_pictures(count: int) -> tuple[list[Image.Image], int]:
    """CC12M's photographs, where they are there, then drawings of different things; and how many are photographs."""
    found = []
    if CC12M.is_file():
        with tarfile.open(CC12M) as archive:
            for name in archive.getnames():
                if name.endswith(".jpg"):
                    with Image.open(io.BytesIO(archive.extractfile(name).read())) as image:
                        found.append(image.convert("RGB"))
    photographs = len(found)
    resvg = pytest.importorskip("resvg_py")
    plain = {
        f"{drawing.concept} {drawing.artist}": drawing for drawing in reversed(drawings()[0])
    }  # of each concept one
    for name in sorted(plain)[: count - photographs]:
        text = plain[name].path.read_text(encoding="utf-8")
        png = resvg.svg_to_bytes(svg_string=text, width=SIDE, height=SIDE, skip_system_fonts=True)
        drawn, white = Image.open(io.BytesIO(png)).convert("RGBA"), Image.new("RGB", (SIDE, SIDE), "white")
        white.paste(drawn, mask=drawn)
        found.append(white)
    return found, photographs


def alike(left: Image.Image, right: Image.Image) -> float:
    """Correlation of grey 32 x 32 thumbnails: knows nothing of hashes."""
    grey = [np.asarray(one.convert("L").resize((32, 32), Image.Resampling.BOX), float).ravel() for one in (left, right)]
    return float(np.corrcoef(*grey)[0, 1])


@pytest.mark.parametrize("count", [120, pytest.param(2000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_planted_copies_are_found(make_set: Callable[..., Path], count: int, record_property: Callable) -> None:
    originals, photographs = real_pictures(count)
    rng = random.Random(0)
    drawn = range(photographs, len(originals))
    chosen = [*range(photographs), *rng.sample(drawn, len(drawn) // 4)]
    planted = [(way, n) for n in chosen for way in WAYS]
    rng.shuffle(planted)
    images = [encoded(image) for image in originals] + [WAYS[way](originals[n]) for way, n in planted]
    folder = make_set("real", images, rows_per_shard=500)
    dedup_sets([SetPath(folder)], DuplicateRules(near=True), workers=2)
    rows = all_rows(folder)
    keys = {row["key"]: n for n, row in enumerate(rows)}

    def origin(row: int) -> int:
        return row if row < len(originals) else planted[row - len(originals)][1]

    found, pairs, right, lookalike = Counter(), 0, 0, 0
    for n, row in enumerate(rows):
        if row["status"] != "dropped":
            continue
        kept = keys[row["reason"].split("real/")[1].split(",")[0]]
        if row["reason"].startswith("near"):
            pairs += 1
            same = origin(n) == origin(kept)
            right += same
            lookalike += same or alike(originals[origin(n)], originals[origin(kept)]) > 0.9
        if n >= len(originals):
            way, whose = planted[n - len(originals)]
            found[way, "photographs" if whose < photographs else "drawings"] += 1
    planted_of = {"photographs": photographs, "drawings": len(chosen) - photographs}
    recall = {
        kind: {way: round(found[way, kind] / count, 3) for way in WAYS} for kind, count in planted_of.items() if count
    }
    told = {
        "pictures": len(originals), "copies of each way": planted_of, "recall": recall, "near pairs": pairs,
        "precision by identity": round(right / max(1, pairs), 3),
        "or alike in thumbnails": round(lookalike / max(1, pairs), 3),
    }  # fmt: skip
    print(json.dumps(told))
    record_property("copies", told)
    for kind, ways in recall.items():
        assert ways["exact"] == 1.0, "all exact copies"
        assert min(ways["recompressed"], ways["another format"]) >= 0.9, kind
        assert ways["resized"] >= {"photographs": 0.97, "drawings": 0.6}[kind]
    assert recall.get("photographs", {"cut": 1})["cut"] >= 0.75
    assert told["or alike in thumbnails"] >= 0.9
