"""`internimage shards reshard`, `merge` and `split`: new sets from what is left of old ones.

plan    which row goes where      one process, once          OUTPUT/.curation/plan.parquet
units   one new shard each        any number of processes    OUTPUT/00000.tar ...
finish  manifests                 whoever sees the last unit done
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.curation.catalogue import WORK_FOLDER, open_catalogue, quoted
from data_pipeline.curation.decisions import SetPath, need_tars, open_settled
from data_pipeline.curation.filters import DERIVED
from data_pipeline.curation.plans import Plan, make_plan
from data_pipeline.curation.repacking import Repack, Source, name_sources
from data_pipeline.durable import file_lock, remove_leftovers, write_durably
from data_pipeline.errors import UserError, first_ten
from data_pipeline.executors.units import UNITS_FOLDER, Executor, Part, run_units
from data_pipeline.format import Manifest, read_manifest, write_manifest
from data_pipeline.format.manifest import SET_MANIFEST
from data_pipeline.preparation.packing.output import agree_on_plan
from data_pipeline.preparation.packing.samples import check_rows_per_shard, read_entry, recover
from data_pipeline.reading.storage.sources import merge_classes


@dataclass(frozen=True)
class Running:
    """Where and how much of the work is done: `part` of it, by which executor, in how many processes."""

    part: Part | None = None
    executor: Executor = "processes"
    workers: int | None = None
    memory_gb: float = 1.0
    progress: ProgressCallback | None = None


@dataclass(frozen=True)
class RepackSummary:
    """samples: by new set; shards: of all. finished: whether the sets are whole; if not, other tasks are at work."""

    output: Path
    samples: Mapping[str, int]
    shards: int
    finished: bool


def reshard_set(
    source: SetPath,
    output: Path,
    *,
    samples_per_shard: int = 1000,
    shuffle: int | None = None,
    running: Running | None = None,
) -> RepackSummary:
    """Writes the samples of a set that are used into shards of equal size, in their order or shuffled by a seed."""
    return merge_sets([source], output, samples_per_shard=samples_per_shard, shuffle=shuffle, running=running)


def merge_sets(
    sources: Sequence[SetPath],
    output: Path,
    *,
    samples_per_shard: int = 1000,
    shuffle: int | None = None,
    running: Running | None = None,
) -> RepackSummary:
    """Writes the used samples of several sets into one, one set after another or shuffled by a seed.

    Classes are joined by name. Keys stay; where sets share some, every key gets its set's name before it.
    """
    what = "reshard" if len(sources) == 1 else "merge"
    return _repack(what, sources, output, [""], "0", samples_per_shard, shuffle, {}, running or Running())


def split_set(
    source: SetPath,
    output: Path,
    shares: Mapping[str, float],
    *,
    by: str = "sha256",
    samples_per_shard: int = 1000,
    seed: int = 0,
    running: Running | None = None,
) -> RepackSummary:
    """Splits a set by a hash of a column into sets OUTPUT/NAME, whose shares of the column's values are as given.

    Rows with equal values of the column never stand on two sides: by the image's digest, copies stay together.
    """
    if any(share <= 0 for share in shares.values()) or len(shares) < 2:
        raise UserError(f"shares {dict(shares)}: give two or more above 0, as train=0.9 validation=0.1")
    if any(not name.isidentifier() and not name.replace("-", "_").isidentifier() for name in shares):
        raise UserError(f"shares {dict(shares)}: names are folders; use letters, digits, - and _")
    value = f"md5_number_lower({quoted(str(seed))} || ':' || coalesce(({DERIVED.get(by, by)})::VARCHAR, ''))"
    upto, cases = 0.0, []
    for number, share in enumerate(shares.values()):
        upto += share / sum(shares.values())
        cases.append(f"when {value} < {round(upto * 2**64)}::UHUGEINT then {number}")
    target = f"case {' '.join(cases)} else {len(shares) - 1} end"
    options = {"shares": dict(shares), "by": by, "seed": seed}
    return _repack(
        "split", [source], output, list(shares), target, samples_per_shard, None, options, running or Running()
    )


def _repack(
    what: str,
    paths: Sequence[SetPath],
    output: Path,
    names: Sequence[str],
    target: str,
    samples_per_shard: int,
    shuffle: int | None,
    options: Mapping[str, Any],
    running: Running,
) -> RepackSummary:
    check_rows_per_shard(samples_per_shard)
    sets = [open_settled(path) for path in paths]
    for one in sets:
        if output.resolve() in (one.folder.resolve(), one.index_folder.resolve()):
            raise UserError(f"output {output} is one of the sources; choose another folder")
    _check_annotations(sets)
    step: dict[str, Any] = {"what": what, "options": {**options, "samples_per_shard": samples_per_shard}}
    if shuffle is not None:
        step["options"]["shuffle"] = shuffle
    step["sources"] = [
        {"name": one.name, "samples": one.samples, "history": [dict(past) for past in one.history]} for one in sets
    ]
    identity = [[[entry.name, entry.sha256] for entry in one.shards] + [one.revision] for one in sets]
    # Hashes of a row's place in the sources: no version of a library changes the order.
    order = "id" if shuffle is None else f"md5_number_lower({quoted(f'{shuffle}:')} || id::VARCHAR)"
    output.mkdir(parents=True, exist_ok=True)
    with file_lock(output / ".lock"):
        agree_on_plan(output, step | {"input": _digest(identity)})
        plan = Plan.read(output)
        done = all((output / name / SET_MANIFEST).exists() for name in names)
        if plan is None and not done:
            need_tars((one, entry) for one in sets for entry in one.shards)
            with open_catalogue(sets, memory_gb=running.memory_gb, scratch=output) as catalogue:
                if options.get("by", "sha256") not in (*catalogue.columns(), *DERIVED):
                    raise UserError(f"there is no column {options['by']}; columns are {', '.join(catalogue.columns())}")
                plan = make_plan(catalogue, output, names, target, order, samples_per_shard)
    if not done:
        assert plan is not None
        work = Repack(output, tuple((one.folder, one.index_folder) for one in sets))
        whole = run_units(
            work,
            output,
            plan.units,
            lambda unit: read_entry(*plan.place(unit)) is not None,
            part=running.part,
            executor=running.executor,
            workers=running.workers,
            progress=running.progress,
        )
        if not whole:
            shards = sum(read_entry(*plan.place(unit)) is not None for unit in range(plan.units))
            return RepackSummary(output, {}, shards, finished=False)
        with file_lock(output / ".lock"):
            _finish(plan, name_sources(sets), step)
    for used_up in (UNITS_FOLDER, WORK_FOLDER):
        shutil.rmtree(output / used_up, ignore_errors=True)
    made = {name: read_manifest(output / name) for name in names}
    samples = {name or output.name: one.samples for name, one in made.items()}
    return RepackSummary(output, samples, sum(len(one.shards) for one in made.values()), finished=True)


def _finish(plan: Plan, sources: Sequence[Source], step: Mapping[str, Any]) -> None:
    """Writes the manifests of whole sets, where that is not done, and clears what killed tasks have left."""
    sets = [source.manifest for source in sources]
    classes, _ = merge_classes([one.classes for one in sets])
    for target in plan.targets:
        folder = plan.folder / target.name
        folder.mkdir(exist_ok=True)
        recover(folder)
        if (folder / SET_MANIFEST).exists():
            continue
        found = [read_entry(folder, shard) for shard in range(target.shards)]
        entries = [entry for entry in found if entry is not None]
        sizes = {entry.name: entry.samples for entry in entries}
        write_durably(folder / "sizes.json", (json.dumps(sizes, indent=1) + "\n").encode())
        name = folder.resolve().name
        write_manifest(folder, name=name, shards=entries, classes=classes, about=_about(sets), history=[step])
    remove_leftovers(plan.folder)


def _check_annotations(sets: Sequence[Manifest]) -> None:
    """Annotations keep the class numbers of their own set. Raises UserError where the sets number classes otherwise."""
    kinds = {(one.about.get("annotations"), one.about.get("category_ids"), one.classes) for one in sets}
    if len(kinds) > 1 and any(annotations for annotations, _, _ in kinds):
        raise UserError(
            f"{first_ten([one.name for one in sets])}: sets with objects or label maps are joined where they have the "
            "same kind of annotations and the same classes; train on several sets by naming each in data.sources"
        )


def _about(sets: Sequence[Manifest]) -> dict[str, Any]:
    """Joins what sets say of their origin and licence; texts that differ stand one after another."""
    joined: dict[str, Any] = {}
    for one in sets:
        for name, value in one.about.items():
            former = joined.setdefault(name, value)
            if value != former and isinstance(value, str) and value not in str(former).split("; "):
                joined[name] = f"{former}; {value}"
    return joined


def _digest(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
