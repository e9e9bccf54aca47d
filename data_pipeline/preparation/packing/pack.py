"""`internimage shards pack`: makes shards from local images and captions.

Row r of the input goes to shard r // rows_per_shard, place r % rows_per_shard, whether it is packed or rejected: a run
that was killed, or run again, changes no byte of what is there. A run with `retry` makes rows anew that were rejected
for these reasons, and writes a shard anew only where that changed a row.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.callbacks import Notice, ProgressCallback
from data_pipeline.durable import write_durably
from data_pipeline.errors import StoppedError, UserError
from data_pipeline.executors.processes import available
from data_pipeline.executors.units import Part, stop_requests
from data_pipeline.format import ShardEntry, count_reasons, read_sidecar, write_manifest
from data_pipeline.format.manifest import SET_MANIFEST
from data_pipeline.preparation.packing.away import Away
from data_pipeline.preparation.packing.output import check_part, hold_output, part_folder, part_plan
from data_pipeline.preparation.packing.retries import wanted_again
from data_pipeline.preparation.packing.rows import Captionless
from data_pipeline.preparation.packing.rules import ImageRules
from data_pipeline.preparation.packing.samples import (
    check_rows_per_shard,
    commit_shard,
    read_entry,
    recover,
    shard_stem,
)
from data_pipeline.preparation.packing.shuffling import Places, in_places, shuffled_places
from data_pipeline.preparation.packing.staging import Due, Shards, staged_shards
from data_pipeline.preparation.sources.columns import Columns, TableFormat
from data_pipeline.preparation.sources.folders import FolderLabels
from data_pipeline.preparation.sources.labels import numbered, survey
from data_pipeline.preparation.sources.opening import open_images
from data_pipeline.preparation.sources.rows import Row


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
    away: Away | None = None,
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
    away: object storage that takes each shard's tar as soon as it is whole; `output` keeps all else
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
    if part is not None:
        check_part(output, part)
    plan = part_plan(plan | {"captionless": captionless, "shuffle": shuffle}, part)
    places = None if shuffle is None else shuffled_places(number_of_rows, shuffle)
    output = part_folder(output, part)
    with hold_output(output, plan), stop_requests() as stopping:
        numbers = shard_numbers(number_of_rows, rows_per_shard, part)
        entries = {number: entry for number in numbers if (entry := read_entry(output, number)) is not None}
        if away is not None:
            for entry in entries.values():
                away.send(output, entry)
        again = {number: wanted_again(output, entry, retry) for number, entry in entries.items()} if retry else {}
        again = {number: rows for number, rows in again.items() if rows}
        untouched = set(entries) - set(again)
        retried = sum(map(len, again.values()))
        if len(untouched) < len(numbers):
            done = sum(min(rows_per_shard, number_of_rows - number * rows_per_shard) for number in entries) - retried
            shard_of = partial(_shard_of, rows_per_shard=rows_per_shard, places=places)
            due = {
                number: Due(number, entries.get(number), again.get(number, {}))
                for number in numbers
                if number not in untouched
            }
            rows: Iterator[Row] = (
                row
                for row in numbered(found.rows(), names)
                if (shard := due.get(shard_of(row.number))) and (shard.former is None or row.number in shard.again)
            )
            if places is not None:
                rows = in_places(rows, places, rows_per_shard)
            shards = Shards(output, rules, captionless, rows_per_shard, names, found.further, away)
            step = _Steps(done, number_of_rows, progress).step
            processes = available() if workers is None else workers
            for number, entry in staged_shards(shards, due, rows, shard_of, processes, step):
                if entry is None:
                    untouched.add(number)
                    continue
                commit_shard(output, shard_stem(number))
                entries[number] = entry
                if away is not None:
                    away.send(output, entry)
                if stopping():
                    raise StoppedError(f"stopped behind shard {number}, as asked; the same command goes on in {output}")
            recover(output)  # what a process left that an image killed
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
    said = asdict(rules)
    if not rules.pdq:  # plans of former versions do not have it
        del said["pdq"]
    return made | {"rules": said}


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


class _Steps:
    """Counts rows for a progress display."""

    def __init__(self, done: int, total: int, progress: ProgressCallback | None) -> None:
        self._done, self._total, self._progress = done, total, progress

    def step(self, rows: int) -> None:
        self._done += rows
        if self._progress is not None:
            self._progress(self._done, self._total)
