"""`internimage shards pack`: makes shards from local images and captions.

Row r of the input goes to shard r // rows_per_shard, place r % rows_per_shard, whether it is packed or rejected: a run
that was killed, or run again, changes no byte of what is there.
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.durable import file_sha256, write_durably
from data_pipeline.errors import UserError
from data_pipeline.executors.processes import available, ordered_map
from data_pipeline.format import ShardEntry, count_reasons, read_sidecar, write_manifest
from data_pipeline.format.index import NO_IMAGE
from data_pipeline.format.manifest import SET_MANIFEST
from data_pipeline.preparation.packing.images import ImageRules, Prepared, Refused, prepare
from data_pipeline.preparation.packing.output import folder_digest, hold_output
from data_pipeline.preparation.packing.samples import Sample, check_rows_per_shard, pack_shard, read_entry
from data_pipeline.preparation.sources.rows import (
    Columns,
    FolderLabels,
    Row,
    read_folder,
    read_table,
    resolve,
    table_kind,
)

UNKNOWN_LABEL = "label_unknown"
UNREADABLE = "image_unreadable"


@dataclass(frozen=True)
class PackSummary:
    """Counts of the input: rows = packed + the sum of `rejected`."""

    output: Path
    rows: int
    packed: int
    rejected: Mapping[str, int]
    shards: int
    shards_found: int  # finished by an earlier run
    classes: int
    bytes: int
    seconds: float


def pack(
    source: Path,
    output: Path,
    *,
    columns: Columns | None = None,
    root: Path | None = None,
    labels: FolderLabels = "auto",
    classes: Sequence[str] | None = None,
    rules: ImageRules | None = None,
    rows_per_shard: int = 1000,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> PackSummary:
    """Packs a folder of images or a CSV, TSV or Parquet table into the set `output`; goes on where a killed run ended.

    source: folder (captions beside the images, or one sub-folder a class) or table; `rows` has the layouts
    columns, root: of a table: its columns by role, and what relative image paths are relative to
    labels: of a folder: whether sub-folders are classes
    classes: category names in the order of their numbers; default: the names found, sorted (numbers stay numbers)
    rules: what is done with the images
    Raises UserError for what cannot be packed; a row that cannot is recorded in its sidecar, never raised.
    """
    started = time.monotonic()
    source, output, rules = Path(source), Path(output), rules or ImageRules()
    check_rows_per_shard(rows_per_shard)
    read, digest = _source(source, output, columns, root, labels)
    number_of_rows, names = survey(read(), classes)
    if number_of_rows == 0:
        raise UserError(f"{source} holds no rows to pack; check the path")
    plan = run_plan("pack", digest, number_of_rows, rows_per_shard, names, rules)
    found: set[int] = set()
    with hold_output(output, plan):
        numbers = range(-(-number_of_rows // rows_per_shard))
        entries = {number: entry for number in numbers if (entry := read_entry(output, number)) is not None}
        found = set(entries)
        if len(found) < len(numbers):
            rows = (row for row in numbered(read(), names) if row.number // rows_per_shard not in found)
            packed = ordered_map(partial(pack_row, rules=rules), rows, available() if workers is None else workers)
            samples = _counted(packed, found, rows_per_shard, number_of_rows, progress)
            for number, group in itertools.groupby(samples, key=lambda sample: sample.row // rows_per_shard):
                entries[number] = pack_shard(output, number, number * rows_per_shard, group, classes=names)
        finish(output, [entries[number] for number in numbers], names)
    counts = count_rows(output, [entries[number] for number in numbers], names)
    return PackSummary(**counts, shards_found=len(found), seconds=time.monotonic() - started)


def run_plan(
    what: str, source: dict[str, Any], rows: int, rows_per_shard: int, classes: Sequence[str] | None, rules: ImageRules
) -> dict[str, Any]:
    """Makes the content of `plan.json`. source: what tells this input from another."""
    names = None if classes is None else list(classes)
    made = {"what": what, "input": source, "rows": rows, "rows_per_shard": rows_per_shard, "classes": names}
    return made | {"rules": asdict(rules)}


def pack_row(row: Row, rules: ImageRules) -> Sample:
    """Prepares one input row, whose label is a class number by now."""
    sample = sample_of(row)
    if row.reason:
        return sample
    try:
        data = row.image if isinstance(row.image, bytes | None) else row.image.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        data = None
    except (OSError, ValueError):  # permissions, a folder, a name with a NUL
        return replace(sample, reason=UNREADABLE)
    return replace(sample, reason=NO_IMAGE) if data is None else with_image(sample, prepare(data, rules))


def sample_of(row: Row) -> Sample:
    """Makes the sample of a row, without its image."""
    label = row.label if isinstance(row.label, int) else None
    return Sample(row=row.number, caption=row.caption, label=label, url=row.url, reason=row.reason)


def with_image(sample: Sample, image: Prepared | Refused) -> Sample:
    """Adds the image to a sample, or the reason why it has none."""
    return replace(sample, **{("image" if name == "data" else name): value for name, value in image._asdict().items()})


def finish(
    output: Path,
    entries: Sequence[ShardEntry],
    classes: Sequence[str] | None,
    *,
    about: Mapping[str, str] | None = None,
) -> None:
    """Makes the shards a set: writes `sizes.json` for WebDataset's own tools, then the manifest, last.

    Writing a shard takes the manifest away, so a manifest that is there describes the shards that are there.
    """
    if (output / SET_MANIFEST).exists():
        return
    sizes = {entry.name: entry.samples for entry in entries}
    write_durably(output / "sizes.json", (json.dumps(sizes, indent=1) + "\n").encode())
    write_manifest(output, name=output.resolve().name, shards=entries, classes=classes, about=about)


def _source(
    source: Path, output: Path, columns: Columns | None, root: Path | None, labels: FolderLabels
) -> tuple[Callable[[], Iterator[Row]], dict[str, Any]]:
    """Returns a function that reads the rows, and what tells this input from another."""
    if source.is_dir():
        if output.resolve().is_relative_to(source.resolve()):
            raise UserError(f"output {output} lies inside the source {source}; choose a folder outside it")
        if columns not in (None, Columns()):
            raise UserError(f"{source} is a folder: it has no columns; leave the column options out")
        files = sorted(path for path in source.rglob("*") if path.is_file())
        return partial(read_folder, source, labels=labels), {
            "sha256": folder_digest(source, files),
            "labels": labels,
        }
    kind = table_kind(source)
    if kind is None or kind == "txt":
        raise UserError(f"{source} is neither a folder nor a .csv, .tsv or .parquet table; give one of these")
    columns = resolve(source, columns or Columns(), needs="image")
    read = partial(read_table, source, columns, root=root)
    return read, {"sha256": file_sha256(source), "columns": asdict(columns), "root": str(root) if root else None}


def survey(rows: Iterator[Row], classes: Sequence[str] | None) -> tuple[int, tuple[str, ...] | None]:
    """Counts the rows and names the classes: those given, else those found, sorted; None where no row has a label."""
    count = 0
    names: set[str] = set()
    largest = -1
    for row in rows:
        count += 1
        if isinstance(row.label, int):
            largest = max(largest, row.label)
        elif row.label is not None:
            names.add(row.label)
    if classes is not None:
        return count, tuple(classes)
    if names and all(name.isdecimal() for name in names):  # a CSV file has text alone; all-digit labels are numbers
        largest, names = max(largest, *map(int, names)), set()
    if names and largest >= 0:
        raise UserError(f"labels are partly numbers and partly names (such as {min(names)!r}); use one of the two")
    if largest >= 100_000:
        raise UserError(f"label {largest} would mean {largest + 1:,} classes; give the class names to number them anew")
    if names:
        return count, tuple(sorted(names))
    return count, tuple(map(str, range(largest + 1))) if largest >= 0 else None


def numbered(rows: Iterator[Row], classes: Sequence[str] | None) -> Iterator[Row]:
    """Yields rows with class numbers for labels. A name goes before a number; an unknown label rejects the row."""
    numbers = {name: number for number, name in enumerate(classes or ())}
    for row in rows:
        if row.label is None:
            yield row
            continue
        number = numbers.get(str(row.label))
        if number is None and str(row.label).isdecimal() and int(row.label) < len(numbers):
            number = int(row.label)
        yield replace(row, label=number, reason=row.reason or ("" if number is not None else UNKNOWN_LABEL))


def _counted(
    samples: Iterator[Sample], found: set[int], rows_per_shard: int, total: int, progress: ProgressCallback | None
) -> Iterator[Sample]:
    done = sum(min(rows_per_shard, total - number * rows_per_shard) for number in found)
    for sample in samples:
        done += 1
        if progress is not None:
            progress(done, total)
        yield sample


def count_rows(output: Path, entries: Sequence[ShardEntry], classes: Sequence[str] | None) -> dict[str, Any]:
    """Returns the fields that every summary shares, from the sidecars; rejected rows by reason, most frequent first."""
    rejected: Counter[str] = Counter()
    rows = 0
    for entry in entries:
        table = read_sidecar(output / entry.sidecar)
        rows += table.num_rows
        rejected.update(count_reasons(table))
    return {
        "output": output,
        "rows": rows,
        "packed": sum(entry.samples for entry in entries),
        "rejected": dict(rejected.most_common()),
        "shards": len(entries),
        "classes": len(classes or ()),
        "bytes": sum(entry.bytes for entry in entries),
    }
