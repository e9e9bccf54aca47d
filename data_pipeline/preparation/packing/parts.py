"""Shares a packing or fetching run among tasks: each part is a set of its own until all are there.

OUTPUT/.parts/00003-of-00032/   shards 12 to 15 with the numbers they will have, plan, lock, manifest
      .units/                   who works on which part
      .hosts/                   what the parts of a fetching run know of hosts together
OUTPUT/00000.tar ...            moved here by `finish_parts`; the manifest comes last, then `.parts` goes
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.durable import file_lock, remove_leftovers, sync_folder, write_durably
from data_pipeline.errors import UserError, first_ten
from data_pipeline.executors.units import UNITS_FOLDER, Executor, Part, run_units
from data_pipeline.format import ShardEntry, read_manifest
from data_pipeline.format.manifest import AWAY, SET_MANIFEST
from data_pipeline.preparation.fetching.shared import HOSTS_FOLDER
from data_pipeline.preparation.packing.output import PARTS_FOLDER, PLAN, check_part, part_folder
from data_pipeline.preparation.packing.pack import count_rows, finish


@dataclass(frozen=True)
class FinishSummary:
    """rows: of the input; rejected: of these, by reason."""

    output: Path
    parts: int
    shards: int
    rows: int
    samples: int
    rejected: Mapping[str, int]


class PartRun(Protocol):
    """Makes one part of a run; must be picklable where other processes call it."""

    def __call__(self, *, part: Part) -> object: ...


@dataclass(frozen=True)
class _Parts:
    """The unit of work: call it with a part's number."""

    output: Path
    count: int
    run: PartRun

    def __call__(self, number: int) -> None:
        if not self.done(number):
            self.run(part=Part(number, self.count))

    def done(self, number: int) -> bool:
        whole = (self.output / SET_MANIFEST).exists()
        return whole or (part_folder(self.output, Part(number, self.count)) / SET_MANIFEST).exists()


def in_parts(
    output: Path, count: int, run: PartRun, *, executor: Executor = "processes", at_a_time: int = 1
) -> FinishSummary | None:
    """Makes the parts that no other task works on and finishes the set where all are done.

    executor, at_a_time: here, so many at a time; or on Ray's cluster, one a core. Returns None where other tasks are
    still at work; the last of them finishes the set. Raises StoppedError as `run` does, UserError where it was begun in
    another number of parts.
    """
    check_part(output, Part(0, count))
    output.mkdir(parents=True, exist_ok=True)
    parts = _Parts(output, count, run)
    whole = run_units(parts, output, count, parts.done, executor=executor, workers=at_a_time)
    return finish_parts(output, count) if whole else None


def finish_parts(output: Path, count: int | None = None) -> FinishSummary:
    """Makes one set of the `count` parts of a run (default: as its folders say); goes on where a killed call was.

    Raises UserError where parts are missing, naming them, or where they are not of one run.
    """
    folder = output / PARTS_FOLDER
    with file_lock(output / ".lock"):
        found = sorted(folder.glob("*-of-*")) if folder.is_dir() else []
        if (output / SET_MANIFEST).exists():
            parts = len(found)
        else:
            if not found:
                raise UserError(f"{output} holds no parts of a run; check the path")
            parts = count or int(found[0].name.rpartition("-of-")[2])
            _join(output, [folder / f"{n + 1:05d}-of-{parts:05d}" for n in range(parts)])
        for used_up in (PARTS_FOLDER, UNITS_FOLDER, HOSTS_FOLDER):
            shutil.rmtree(output / used_up, ignore_errors=True)
    made = read_manifest(output)
    counts = count_rows(output, made.shards, made.classes)
    return FinishSummary(output, parts, len(made.shards), counts["rows"], made.samples, counts["rejected"])


def _join(output: Path, parts: list[Path]) -> None:
    missing = [part.name for part in parts if not (part / SET_MANIFEST).exists()]
    if missing:
        raise UserError(
            f"{output}: {len(missing)} of {len(parts)} parts are not done ({first_ten(missing)}); run the same command "
            "again for each, then finish"
        )
    plans = [json.loads((part / PLAN).read_bytes()) for part in parts]
    for plan in plans:
        plan.pop("part")
    if any(plan != plans[0] for plan in plans):
        raise UserError(f"{output}: the parts were made with different input or options; begin anew in another folder")
    remove_leftovers(output)
    sets = [read_manifest(part) for part in parts]
    entries: list[ShardEntry] = []
    for part, one in zip(parts, sets, strict=True):
        for entry in one.shards:
            _move(part, output, entry)
            entries.append(entry)
    sync_folder(output)
    write_durably(output / PLAN, json.dumps(plans[0], indent=1, ensure_ascii=False) + "\n")
    finish(output, entries, sets[0].classes)


def _move(part: Path, output: Path, entry: ShardEntry) -> None:
    """Moves the files of a shard; those that an earlier call has moved are there already.

    Statistics go first: they tell the tar behind them from a foreign shard, as long as there is no manifest.
    """
    stem = Path(entry.name).stem
    for name in (f"{stem}_stats.json", entry.name, entry.sidecar, stem + AWAY):
        if (part / name).exists():
            os.replace(part / name, output / name)
