"""The embedded set: two artists' drawings of the same things with their names and categories, all brought by pip.

    OUTPUT/train/                 both artists' drawings of the training concepts; of the concepts of the two -artist
                                  sets Twemoji's alone
    OUTPUT/validation/            unseen concepts: OpenMoji's drawing of each of 100 that train has from no artist
    OUTPUT/validation-artist/     another artist: OpenMoji's drawing of each of 100 that train has from Twemoji alone
    OUTPUT/held-out/              unseen concepts, 200 others
    OUTPUT/held-out-artist/       another artist, 200 others

Choices are made on validation; the held-out sets are looked at once. Drawings: OpenMoji, CC BY-SA 4.0, and Twemoji,
CC BY 4.0 (the manifest's `about` carries the attribution, each JSON member the artist and the licence).
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
from data_pipeline.preparation.sources.emoji_concepts import skin_tones
from data_pipeline.preparation.sources.emoji_drawings import CLASSES, Drawing, drawings

# Concepts of each withheld set, in the order in which they are drawn.
WITHHELD = {"held-out": 200, "held-out-artist": 200, "validation": 100, "validation-artist": 100}
SPLITS = ("train", *WITHHELD)
# Families with more drawings than this (people, the couples' combinations) stay in training: too much would be lost.
LARGEST_WITHHELD = 60
JPEG_QUALITY = 95
_OVERSIZE, _MARGIN = 2, 1 / 24  # pixels rendered for one kept; white around the drawing, as a share of its longer side
_RECIPE = 4  # to be raised with any change of what build_openmoji() writes


def build_openmoji(
    output: Path,
    *,
    image_size: int = 96,
    rows_per_shard: int = 512,
    drawings_a_concept: int | None = None,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Path]:
    """Writes the five sets under `output` and returns their folders by split; sets already there are left alone.

    Images are `image_size` x `image_size` px JPEG on white, cut to what is drawn: one artist leaves a margin and the
    other does not. The bytes are the same on every run with the same versions of the libraries, for any number of
    `workers` (processes; default: one a core, 8 at most). `drawings_a_concept` bounds each artist's training drawings
    of one concept: with all of them (the default) people in five skin tones are three fifths of the set. The plainest
    drawing stays, SHA-256 chooses among the others.
    Raises UserError where the drawings are not installed or `output` holds something else.
    """
    if not 1 <= image_size <= 2048:
        raise UserError(f"image_size {image_size}: drawings are rendered at 1 to 2048 px; choose such a size")
    check_rows_per_shard(rows_per_shard)
    folders = {split: Path(output) / split for split in SPLITS}
    recipe = {"recipe": _RECIPE, "image_size": image_size, "rows_per_shard": rows_per_shard}
    recipe["drawings_a_concept"] = drawings_a_concept or 0
    if all(_finished(folder, recipe) for folder in folders.values()):
        return folders
    found, unnamed = drawings()
    plain = [drawing for drawing in found if not skin_tones(drawing.code)]
    workers = min(8, available()) if workers is None else workers
    pictures = _render(plain, image_size, workers, progress)
    splits = split(found, same_as=pictures, drawings_a_concept=drawings_a_concept)
    wanted = [drawing for chosen in splits.values() for drawing in chosen if drawing not in pictures]
    pictures |= _render(wanted, image_size, workers, progress)
    counts = {"named": len(found), "unnamed": unnamed}
    counts["left out"] = len(found) - sum(map(len, splits.values()))
    for name, chosen in splits.items():
        if not _finished(folders[name], recipe):
            _write(folders[name], name, chosen, pictures, recipe, counts)
    return folders


def split(
    found: Sequence[Drawing], *, same_as: dict[Drawing, bytes] | None = None, drawings_a_concept: int | None = None
) -> dict[str, list[Drawing]]:
    """Drawings by split. Drawings of equal bytes in `same_as` are one concept.

    SHA-256 of the concept's name orders the concepts; each withheld set takes the next `WITHHELD` candidates, so that
    all have the categories in their natural proportions. Candidates: listed emoji that both artists drew, families up
    to `LARGEST_WITHHELD` drawings, words that name no other concept. Each is shown by OpenMoji's plainest drawing; what
    else OpenMoji drew of it is in no split, and neither is what Twemoji drew of an unseen one.
    """
    concepts = _group(found, same_as or {})
    shown = {name: own[0] for name, members in concepts.items() if (own := _by(members, "openmoji"))}
    uses = Counter(drawing.plain_caption for drawing in shown.values())
    candidates = []
    for name in sorted(shown, key=lambda name: hashlib.sha256(f"two artists:{name}".encode()).digest()):
        drawing, members = shown[name], concepts[name]
        twin = any(other.code == drawing.code for other in _by(members, "twemoji"))
        if drawing.listed and twin and len(members) <= LARGEST_WITHHELD and uses[drawing.plain_caption] == 1:
            candidates.append(name)
    withheld: dict[str, list[str]] = {}
    for name, count in WITHHELD.items():
        withheld[name], candidates = candidates[:count], candidates[count:]
    unseen = {*withheld["held-out"], *withheld["validation"]}
    once = {*withheld["held-out-artist"], *withheld["validation-artist"]}
    train = []
    for name, members in concepts.items():
        for artist in () if name in unseen else ("twemoji",) if name in once else ("openmoji", "twemoji"):
            own = _by(members, artist)
            train += [*own[:1], *sorted(own[1:], key=partial(_place, "variants"))][:drawings_a_concept]
    chosen = {"train": train} | {name: [shown[one] for one in names] for name, names in withheld.items()}
    return {name: sorted(chosen[name], key=partial(_place, "order")) for name in SPLITS}


def _by(members: Iterable[Drawing], artist: str) -> list[Drawing]:
    """One artist's drawings, the plainest first."""
    own = (one for one in members if one.artist.name == artist)
    return sorted(own, key=lambda one: (one.rank, one.code))


def _place(what: str, drawing: Drawing) -> bytes:
    """Where a drawing stands in an order that chance might have made, the same everywhere."""
    return hashlib.sha256(f"{what}:{drawing.artist.name}:{drawing.code}".encode()).digest()


def _group(found: Sequence[Drawing], same_as: dict[Drawing, bytes]) -> dict[str, list[Drawing]]:
    """Drawings by concept; concepts that share a picture (Norway's flag is Svalbard's) are joined."""
    joined: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := joined.get(name, name)) != name:
            name = above
        return name

    first: dict[bytes, str] = {}
    for drawing in found:
        if drawing in same_as:
            one, other = root(first.setdefault(same_as[drawing], drawing.concept)), root(drawing.concept)
            if one != other:
                joined[max(one, other)] = min(one, other)
    concepts: dict[str, list[Drawing]] = {}
    for drawing in found:
        concepts.setdefault(root(drawing.concept), []).append(drawing)
    return concepts


def _render(
    chosen: Sequence[Drawing], size: int, workers: int, progress: ProgressCallback | None
) -> dict[Drawing, bytes]:
    """JPEG bytes of each drawing."""
    images = []
    for image in ordered_map(partial(_draw, size=size), [drawing.path for drawing in chosen], workers):
        images.append(image)
        if progress is not None:
            progress(len(images), len(chosen))
    return dict(zip(chosen, images, strict=True))


def _draw(path: Path, size: int) -> bytes:
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=path.read_text(encoding="utf-8"),
        width=_OVERSIZE * size,
        height=_OVERSIZE * size,
        skip_system_fonts=True,
    )
    drawn = Image.open(BytesIO(png)).convert("RGBA")
    left, top, right, bottom = drawn.getchannel("A").getbbox() or (0, 0, *drawn.size)
    side = max(right - left, bottom - top) * (1 + 2 * _MARGIN)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    # Pasted into the middle of a larger white canvas, so that the square around the drawing lies inside.
    canvas = Image.new("RGB", (2 * drawn.width, 2 * drawn.height), "white")
    canvas.paste(drawn, (drawn.width // 2, drawn.height // 2), drawn)
    x, y = x + drawn.width // 2, y + drawn.height // 2
    small = canvas.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
    pixels = np.ascontiguousarray(np.asarray(small))
    return bytes(simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="444"))


def _write(
    folder: Path,
    name: str,
    chosen: list[Drawing],
    pictures: dict[Drawing, bytes],
    recipe: dict[str, int],
    counts: dict[str, int],
) -> None:
    if folder.exists() and not _ours(folder):
        raise UserError(f"{folder} holds files that this did not write; choose another output folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recover(folder)
    entries: list[ShardEntry] = []
    for first in range(0, len(chosen), recipe["rows_per_shard"]):
        rows: Iterable[tuple[int, Drawing]] = enumerate(chosen[first : first + recipe["rows_per_shard"]], first)
        samples = (
            _sample(row, drawing, pictures[drawing], recipe["image_size"], whole=name == "train")
            for row, drawing in rows
        )
        entries.append(pack_shard(folder, len(entries), first, samples, classes=CLASSES))
    drawn_by = sorted({drawing.artist for drawing in chosen})
    about = {
        "source": ", ".join(artist.title for artist in drawn_by),
        "license": ", ".join(artist.license for artist in drawn_by),
        "license_url": ", ".join(artist.license_url for artist in drawn_by),
        "attribution": " ".join(artist.attribution for artist in drawn_by),
        **recipe,
        "concepts": len({drawing.concept for drawing in chosen}),
        "drawings": counts,
    }
    write_manifest(folder, name=f"emoji-{name}", shards=entries, classes=CLASSES, about=about)


def _sample(row: int, drawing: Drawing, image: bytes, size: int, *, whole: bool) -> Sample:
    artist = drawing.artist
    fields = {"code": drawing.code, "concept": drawing.concept, "kind": drawing.kind}
    fields |= {"artist": artist.name, "license": artist.license}
    return Sample(
        row=row,
        image=image,
        width=size,
        height=size,
        caption=drawing.whole_caption if whole else drawing.caption,
        label=drawing.label,
        url=f"{artist.source}{drawing.path.name}",
        fields=fields,
    )


def _finished(folder: Path, recipe: dict[str, int]) -> bool:
    if not (folder / SET_MANIFEST).exists():
        return False
    about = read_manifest(folder).about
    return all(about.get(key) == value for key, value in recipe.items())


def _ours(folder: Path) -> bool:
    """Whether deleting `folder` loses nothing but an earlier or unfinished build of this set."""
    if (folder / SET_MANIFEST).exists():
        return read_manifest(folder).name.startswith(("emoji-", "openmoji-"))
    return all(path.name[:5].isdigit() or path.name.startswith(".") for path in folder.iterdir())
