"""`internimage shards pack`: makes shards from local images and captions.

Row r of the input goes to shard r // rows_per_shard, place r % rows_per_shard, whether it is packed or rejected: a run
that was killed, or run again, changes no byte of what is there. A run with `retry` makes rows anew that were rejected
for these reasons, and writes a shard anew only where that changed a row.
"""

import hashlib
import itertools
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data_pipeline.callbacks import Notice, ProgressCallback
from data_pipeline.durable import write_durably
from data_pipeline.errors import StoppedError, UserError
from data_pipeline.executors.processes import available
from data_pipeline.executors.units import Part, stop_requests
from data_pipeline.format import ShardEntry, count_reasons, read_sidecar, write_manifest
from data_pipeline.format.index import NO_IMAGE
from data_pipeline.format.manifest import SET_MANIFEST
from data_pipeline.preparation.packing.images import ImageRules, Refused, prepare
from data_pipeline.preparation.packing.output import hold_output, part_folder, part_plan
from data_pipeline.preparation.packing.retries import merged, unchanged, wanted_again
from data_pipeline.preparation.packing.samples import Sample, check_rows_per_shard, pack_shard, read_entry
from data_pipeline.preparation.packing.shuffling import Places, in_places, shuffled_places
from data_pipeline.preparation.packing.workers import surviving_map
from data_pipeline.preparation.sources.columns import Columns, TableFormat
from data_pipeline.preparation.sources.folders import FolderLabels
from data_pipeline.preparation.sources.labels import numbered, survey
from data_pipeline.preparation.sources.opening import open_images
from data_pipeline.preparation.sources.rows import Row

UNREADABLE = "image_unreadable"
NO_PLAIN_FILE = "not_a_file"
TOO_LARGE = "too_large"
HASH_MISMATCH = "hash_mismatch"
NO_CAPTION = "caption_missing"
DECODER_DIED = "decoder_died"  # the image killed the process that decoded it

Captionless = Literal["keep", "reject", "empty"]


@dataclass(frozen=True)
class PackSummary:
    """Counts of the input: rows = packed + the sum of `rejected`."""

    output: Path
    rows: int
    packed: int
    rejected: Mapping[str, int]
    shards: int
    shards_found: int  # finished by an earlier run, and left as they were by this one
    classes: int
    bytes: int
    seconds: float
    retried: int = 0  # rows made anew because of `retry`
    passed_over: Mapping[str, int] = field(default_factory=dict)  # files of a folder that are no rows, by reason


def pack(
    source: Path | str,
    output: Path,
    *,
    columns: Columns | None = None,
    format: TableFormat | None = None,
    root: Path | None = None,
    labels: FolderLabels = "auto",
    classes: Sequence[str] | None = None,
    rules: ImageRules | None = None,
    captionless: Captionless = "keep",
    retry: Sequence[str] = (),
    shuffle: int | None = None,
    rows_per_shard: int = 1000,
    part: Part | None = None,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    notice: Notice | None = None,
) -> PackSummary:
    """Packs a folder of images or a table into the set `output`; goes on where a killed run ended.

    source: folder (`sources.folders` has the layouts), table, folder of a table's parts, or the URL of one
    columns, format, root: of a table: its columns by role, how it is read, what relative image paths are relative to
    labels: of a folder: whether sub-folders are classes
    classes: category names in the order of their numbers; default: the names found, sorted (numbers stay numbers)
    rules: what is done with the images
    captionless: whether a row without a caption is packed without one, rejected, or packed with an empty text
    retry: reasons (`image_missing`, `image_*`, ...) whose rows are made anew in shards that are finished
    part: which shards are made, if not all, in a folder of their own; `parts.finish_parts` joins the parts
    shuffle: places the rows in an order drawn from this number; None keeps the input's. Rows that are to be packed are
        held in memory then (not their images, which must be files)
    notice: told how the input is read
    SIGUSR1 or SIGTERM ends the run behind the shard under way, by StoppedError.
    Raises UserError for what cannot be packed; a row that cannot is recorded in its sidecar, never raised.
    """
    started = time.monotonic()
    output, rules = Path(output), rules or ImageRules()
    check_rows_per_shard(rows_per_shard)
    _check_apart(str(source), output)
    found = open_images(str(source), columns or Columns(), format or TableFormat(), root, labels)
    number_of_rows, names = survey(found, classes)
    if number_of_rows == 0:
        raise UserError(f"{source} holds no rows to pack; check the path")
    if notice is not None:
        notice(found.describe())
    plan = run_plan("pack", found.identity(), number_of_rows, rows_per_shard, names, rules)
    plan = part_plan(plan | {"captionless": captionless, "shuffle": shuffle}, part)
    places = None if shuffle is None else shuffled_places(number_of_rows, shuffle)
    output = part_folder(output, part)
    with hold_output(output, plan), stop_requests() as stopping:
        numbers = shard_numbers(number_of_rows, rows_per_shard, part)
        entries = {number: entry for number in numbers if (entry := read_entry(output, number)) is not None}
        again = {number: wanted_again(output, entry, retry) for number, entry in entries.items()} if retry else {}
        again = {number: rows for number, rows in again.items() if rows}
        untouched = set(entries) - set(again)
        retried = sum(map(len, again.values()))
        if len(untouched) < len(numbers):
            done = sum(min(rows_per_shard, number_of_rows - number * rows_per_shard) for number in entries) - retried
            shard_of = partial(_shard_of, rows_per_shard=rows_per_shard, places=places)
            rows: Iterator[Row] = (
                row
                for row in numbered(found.rows(), names)
                if _is_due(row.number, shard_of(row.number), numbers, entries, again)
            )
            if places is not None:
                rows = in_places(rows, places, rows_per_shard)
            work = partial(pack_row, rules=rules, captionless=captionless)
            made = surviving_map(work, rows, available() if workers is None else workers, _given_up)
            samples = _counted(made, done, number_of_rows, progress)
            for number, group in itertools.groupby(samples, key=lambda sample: shard_of(sample.row)):
                first = number * rows_per_shard
                if number in again:
                    fresh = {sample.row: sample for sample in group}
                    if unchanged(again[number], fresh):
                        untouched.add(number)
                        continue
                    group = merged(output, entries[number], fresh)
                entries[number] = pack_shard(output, number, first, group, classes=names, further=found.further)
                if stopping():
                    raise StoppedError(f"stopped behind shard {number}, as asked; the same command goes on in {output}")
        finish(output, [entries[number] for number in numbers], names)
    counts = count_rows(output, [entries[number] for number in numbers], names)
    return PackSummary(
        **counts,
        shards_found=len(untouched),
        retried=retried,
        passed_over=found.passed_over(),
        seconds=time.monotonic() - started,
    )


def shard_numbers(rows: int, rows_per_shard: int, part: Part | None) -> range:
    """Returns the numbers of the shards of so many rows, or of those of a part."""
    count = -(-rows // rows_per_shard)
    return range(count) if part is None else part.units(count)


def run_plan(
    what: str, source: dict[str, Any], rows: int, rows_per_shard: int, classes: Sequence[str] | None, rules: ImageRules
) -> dict[str, Any]:
    """Makes the content of `plan.json`. source: what tells this input from another."""
    names = None if classes is None else list(classes)
    made = {"what": what, "input": source, "rows": rows, "rows_per_shard": rows_per_shard, "classes": names}
    return made | {"rules": asdict(rules)}


def pack_row(row: Row, rules: ImageRules, captionless: Captionless = "keep") -> Sample:
    """Prepares one input row, whose label is a class number by now."""
    sample = sample_of(row, captionless)
    if sample.reason:
        return sample
    if row.image is None:
        return replace(sample, reason=NO_IMAGE)
    found = row.image if isinstance(row.image, bytes) else read_image(row.image, rules.max_bytes)
    if isinstance(found, str):
        return replace(sample, reason=found)
    return with_data(sample, found, row.expected, rules)


def read_image(path: Path, max_bytes: int) -> bytes | str:
    """Reads a file, no more of it than `max_bytes`; returns the reason where there is nothing to read. What is no plain
    file (a pipe, a device) is not waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return NO_IMAGE
    except (OSError, ValueError):  # permissions, a name with a NUL, too many links
        return UNREADABLE
    try:
        with open(handle, "rb") as file:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode):
                return NO_PLAIN_FILE
            # Asked for 100 MB, Python makes room for 100 MB. Files of /proc say that they are empty.
            data = file.read(min(state.st_size or max_bytes, max_bytes) + 1)
    except IsADirectoryError:
        return NO_PLAIN_FILE
    except OSError:
        return UNREADABLE
    return data if len(data) <= max_bytes else TOO_LARGE


def sample_of(row: Row, captionless: Captionless = "keep") -> Sample:
    """Makes the sample of a row, without its image."""
    label = row.label if isinstance(row.label, int) else None
    reason = row.reason or (NO_CAPTION if captionless == "reject" and row.caption is None else "")
    return Sample(
        row=row.number,
        caption=row.caption,
        label=label,
        url=row.url,
        reason=reason,
        further=row.further,
        empty_text=captionless == "empty" and row.caption is None,
        place=row.place,
    )


def with_data(sample: Sample, data: bytes, expected: str | None, rules: ImageRules) -> Sample:
    """Adds an image from a file's bytes, or the reason why there is none. expected: the digest that they must have."""
    digest = None
    if expected is not None:
        digest = hashlib.new({32: "md5", 40: "sha1", 64: "sha256"}[len(expected)], data).hexdigest()
        if digest != expected:
            return replace(sample, reason=HASH_MISMATCH)
    made = prepare(data, rules)
    if isinstance(made, Refused):
        return replace(sample, reason=made.reason, width=made.width, height=made.height)
    known = made.data is data and digest is not None and len(digest) == 64
    return replace(
        sample,
        image=made.data,
        extension=made.extension,
        format=made.format,
        width=made.width,
        height=made.height,
        reason=sample.reason or made.note,
        sha256=digest if known else hashlib.sha256(made.data).hexdigest(),
    )


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


def count_rows(output: Path, entries: Sequence[ShardEntry], classes: Sequence[str] | None) -> dict[str, Any]:
    """Returns the fields that every summary shares, from the sidecars; rejected rows by reason, most frequent first."""
    rejected: Counter[str] = Counter()
    rows = 0
    for entry in entries:
        table = read_sidecar(output / entry.sidecar, ["status", "reason"])
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


def _check_apart(source: str, output: Path) -> None:
    if Path(source).is_dir() and output.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"output {output} lies inside the source {source}; choose a folder outside it")


def _shard_of(row: int, rows_per_shard: int, places: Places | None) -> int:
    return (row if places is None else int(places[row])) // rows_per_shard


def _is_due(
    row: int,
    number: int,
    numbers: range,
    entries: Mapping[int, ShardEntry],
    again: Mapping[int, Mapping[int, str]],
) -> bool:
    """Tells whether a row has to be made: its shard is wanted and not there, or the row is to be made anew."""
    return row in again.get(number, ()) or (number in numbers and number not in entries)


def _given_up(row: Row) -> Sample:
    return replace(sample_of(row), reason=DECODER_DIED)


def _counted(samples: Iterator[Sample], done: int, total: int, progress: ProgressCallback | None) -> Iterator[Sample]:
    for sample in samples:
        done += 1
        if progress is not None:
            progress(done, total)
        yield sample
