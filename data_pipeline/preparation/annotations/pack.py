"""`internimage shards pack IMAGES OUTPUT --coco FILE | --label-maps FOLDER`: annotated pictures into a set.

Rows, shards, resumption and rejected rows are those of `packing.pack`. A sample has one member more, KEY.objects.json
or KEY.labels.png, and its sidecar the columns annotation_offset and annotation_size.

    OUTPUT/left_out.jsonl   {"file", "annotation", "image", "reason"}: objects that could not be packed
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.durable import file_sha256, write_durably
from data_pipeline.errors import UserError
from data_pipeline.executors.processes import available
from data_pipeline.preparation.annotations.coco import CocoIndex, LeftOut, Picture
from data_pipeline.preparation.annotations.label_maps import NO_MAP, Pair, convert_label_map, pairs
from data_pipeline.preparation.packing.output import folder_digest, hold_output
from data_pipeline.preparation.packing.pack import PackSummary, count_rows, finish, run_plan
from data_pipeline.preparation.packing.rows import read_image, with_data
from data_pipeline.preparation.packing.rules import ImageRules
from data_pipeline.preparation.packing.samples import Sample, check_rows_per_shard, pack_shard, read_entry
from data_pipeline.preparation.packing.staging import DECODER_DIED
from data_pipeline.preparation.packing.workers import surviving_map

LEFT_OUT = "left_out.jsonl"
SIZE_DIFFERS = "size_differs"  # the picture is not of the size that its annotations say
OBJECTS, LABELS = "objects.json", "labels.png"  # members


@dataclass(frozen=True)
class AnnotatedSummary(PackSummary):
    """objects: packed ones. left_out: objects that could not be, by reason."""

    objects: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)


def pack_coco(
    images: Path,
    output: Path,
    instances: Path,
    *,
    rules: ImageRules | None = None,
    rows_per_shard: int = 1000,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> AnnotatedSummary:
    """Packs the pictures of COCO's `instances` JSON, which lie under `images`, with their objects.

    Classes are the categories by id; `about` of the manifest keeps these ids. A picture that is missing or of another
    size than the JSON says is a rejected row. Raises UserError where the JSON contradicts itself (see CocoIndex).
    """
    output.mkdir(parents=True, exist_ok=True)
    digest = {"coco": file_sha256(_file(instances)), "images": str(images.resolve())}
    left_out: list[LeftOut] = []
    objects = 0
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix=".annotations-", dir=output))
        index = stack.enter_context(closing(CocoIndex(instances, Path(folder))))

        def rows() -> Iterator[Picture]:
            nonlocal objects
            for picture in index.pictures():
                left_out.extend(picture.left_out)
                objects += len(picture.objects)
                yield picture

        summary = _pack(
            "coco",
            digest,
            rows,
            len(index),
            partial(_with_objects, images=images, rules=_unchanged(rules)),
            output,
            classes=index.names,
            about={"category_ids": ",".join(map(str, index.ids)), "annotations": "objects"},
            rules=_unchanged(rules),
            rows_per_shard=rows_per_shard,
            workers=workers,
            progress=progress,
        )
    lines = [
        {"file": str(instances), "annotation": one.annotation, "image": one.image, "reason": one.reason}
        for one in left_out
    ]
    write_durably(output / LEFT_OUT, "".join(json.dumps(line) + "\n" for line in lines).encode())
    counts = Counter(one.reason for one in left_out)
    return replace(summary, objects=objects, left_out=dict(counts.most_common()))


def pack_label_maps(
    images: Path,
    output: Path,
    label_maps: Path,
    *,
    classes: Sequence[str],
    reduce_zero_label: bool = False,
    rules: ImageRules | None = None,
    rows_per_shard: int = 1000,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> AnnotatedSummary:
    """Packs the pictures under `images` with the label map of the same relative path under `label_maps`.

    classes: names in the order of their numbers. reduce_zero_label: 0 is no class, 1 the first, as ADE20K has it.
    """
    if not 1 <= len(classes) <= 255:
        raise UserError(
            f"{len(classes)} classes: a label map of 8 bits has 1 to 255; name them, one a line (--classes)"
        )
    found = list(pairs(images, label_maps))
    files = [path for pair in found for path in (pair.image, pair.label_map) if path.is_file()]
    base = Path("/").joinpath(*_common(images.resolve(), label_maps.resolve()))
    digest = {
        "label_maps": folder_digest(base, (path.resolve() for path in files)),
        "reduce_zero_label": reduce_zero_label,
    }
    work = partial(_with_label_map, rules=_unchanged(rules), classes=len(classes), reduce_zero_label=reduce_zero_label)
    return _pack(
        "label maps",
        digest,
        lambda: iter(found),
        len(found),
        work,
        output,
        classes=tuple(classes),
        about={"annotations": "labels"},
        rules=_unchanged(rules),
        rows_per_shard=rows_per_shard,
        workers=workers,
        progress=progress,
    )


def _pack(
    what: str,
    digest: dict[str, Any],
    rows: Callable[[], Iterator[Any]],
    count: int,
    work: Callable[[Any], Sample],
    output: Path,
    *,
    classes: tuple[str, ...],
    about: Mapping[str, str],
    rules: ImageRules,
    rows_per_shard: int,
    workers: int | None,
    progress: ProgressCallback | None,
) -> AnnotatedSummary:
    """Runs `work` on every row whose shard is not there yet. rows: entries with a `number`, in its order."""
    started = time.monotonic()
    check_rows_per_shard(rows_per_shard)
    if not count:
        raise UserError("there is no picture to pack; check the paths")
    plan = run_plan(f"pack {what}", digest, count, rows_per_shard, classes, rules)
    with hold_output(output, plan):
        numbers = range(-(-count // rows_per_shard))
        entries = {number: entry for number in numbers if (entry := read_entry(output, number)) is not None}
        found = set(entries)
        left = (row for row in rows() if row.number // rows_per_shard not in found)
        made = surviving_map(work, left, available() if workers is None else workers, _given_up)
        samples = _counted(made, count, progress)
        for number, group in itertools.groupby(samples, key=lambda sample: sample.row // rows_per_shard):
            entries[number] = pack_shard(output, number, number * rows_per_shard, group, classes=classes)
        ordered = [entries[number] for number in numbers]
        finish(output, ordered, classes, about=about)
    counts = count_rows(output, ordered, classes)
    return AnnotatedSummary(**counts, shards_found=len(found), seconds=time.monotonic() - started)


def _with_objects(picture: Picture, images: Path, rules: ImageRules) -> Sample:
    sample = _with_image(Sample(row=picture.number, url=picture.file_name), images / picture.file_name, rules)
    if sample.image is not None and (sample.width, sample.height) != (picture.width, picture.height):
        sample = replace(sample, image=None, reason=SIZE_DIFFERS)
    content = {"image_id": picture.id, "objects": list(picture.objects)}
    return replace(sample, annotation=json.dumps(content, separators=(",", ":")).encode(), annotation_member=OBJECTS)


def _with_label_map(pair: Pair, rules: ImageRules, classes: int, reduce_zero_label: bool) -> Sample:
    sample = _with_image(Sample(row=pair.number, url=pair.image.name), pair.image, rules)
    if sample.image is None or sample.width is None or sample.height is None:
        return sample
    try:
        data = pair.label_map.read_bytes()
    except OSError:
        return replace(sample, image=None, reason=NO_MAP)
    size = sample.width, sample.height
    made = convert_label_map(data, size, classes, reduce_zero_label=reduce_zero_label)
    if isinstance(made, str):
        return replace(sample, image=None, reason=made)
    return replace(sample, annotation=made, annotation_member=LABELS)


def _with_image(sample: Sample, path: Path, rules: ImageRules) -> Sample:
    data = read_image(path, rules.max_bytes)
    if isinstance(data, str):
        return replace(sample, reason=data)
    return with_data(sample, without_exif(data), None, rules)


def _given_up(row: Picture | Pair) -> Sample:
    return Sample(row=row.number, reason=DECODER_DIED)


def without_exif(data: bytes) -> bytes:
    """A JPEG without its EXIF: annotations are drawn on the pixels as they are stored, so nothing may turn these."""
    if data[:2] != b"\xff\xd8":
        return data
    kept, position = [data[:2]], 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] not in (0xDA, 0xD9, 0xFF):
        size = 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position : position + size]
        if not (segment[1] == 0xE1 and segment[4:8] == b"Exif"):
            kept.append(segment)
        position += size
    return b"".join([*kept, data[position:]])


def _unchanged(rules: ImageRules | None) -> ImageRules:
    rules = rules or ImageRules()
    if rules.shorter_side is not None:
        raise UserError(
            "annotated pictures keep their size, since their annotations are in pixels: leave shorter_side out"
        )
    return rules


def _counted(samples: Iterable[Sample], total: int, progress: ProgressCallback | None) -> Iterator[Sample]:
    for done, sample in enumerate(samples, 1):
        if progress is not None:
            progress(done, total)
        yield sample


def _file(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the JSON of the annotations")
    return path


def _common(one: Path, other: Path) -> list[str]:
    both = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one.parts, other.parts, strict=False))
    return [part for part, _ in both][1:]
