"""`internimage shards build`: carries a recipe out, stage by stage; a stage that is done is not done again.

OUTPUT/build.json          what was done, by stage: identity (options, and what came in), and the result
       sources/NAME/       a set a source; filter, takedown and dedup leave their decisions there
       shards/             the set to train on
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.curation.decisions import SetPath, open_settled
from data_pipeline.curation.duplicates import dedup_sets
from data_pipeline.curation.filters import check_rules, filter_set
from data_pipeline.curation.recipes import ForecastRecipe, Recipe, SourceRecipe
from data_pipeline.curation.resharding import Running, merge_sets
from data_pipeline.curation.takedown import read_list, take_down
from data_pipeline.durable import file_lock, file_sha256, remove_leftovers, write_durably
from data_pipeline.errors import BadDataError, UserError
from data_pipeline.format.manifest import SET_MANIFEST
from data_pipeline.preparation import check_usable, fetch, pack, stats, verify
from data_pipeline.preparation.packing.output import PLAN, folder_digest

_RECORD = "build.json"


@dataclass(frozen=True)
class Step:
    """One line of the waterfall. `lost`: rows by reason. `skipped`: done by an earlier run."""

    stage: str
    rows: int
    left: int
    lost: Mapping[str, int]
    skipped: bool = False


@dataclass(frozen=True)
class BuildSummary:
    output: Path
    waterfall: tuple[Step, ...]
    samples: int
    shards: int


@dataclass(frozen=True)
class Forecast:
    """What carrying out a recipe will take, by the recipe's own section `forecast`."""

    rows: int
    images: int
    samples: int
    fetched_tb: float
    price: float
    megabits_per_second: float
    hours: float
    sources_gb: float
    shards_gb: float
    files: int


def forecast_rows(rows: int, recipe: Recipe) -> Forecast:
    """Works out a forecast for so many rows of a URL list."""
    said: ForecastRecipe = recipe.forecast
    images, per_shard = round(rows * said.success), recipe.sources[0].rows_per_shard
    samples = round(images * said.kept)
    rate = said.images_per_second * said.machines
    files = 3 * (-(-rows // per_shard) - (-samples // recipe.shards.samples_per_shard)) + 4
    return Forecast(
        rows=rows,
        images=images,
        samples=samples,
        fetched_tb=images * said.fetched_kb / 1e9,
        price=images * said.fetched_kb / 1e9 * said.price_per_tb,
        megabits_per_second=rate * said.fetched_kb * 8 / 1e3,
        hours=images / rate / 3600,
        sources_gb=images * said.kept_kb / 1e6,
        shards_gb=samples * said.kept_kb / 1e6,
        files=files,
    )


def build(
    recipe: Recipe,
    output: Path,
    *,
    workers: int | None = None,
    memory_gb: float = 1.0,
    progress: ProgressCallback | None = None,
    said: Callable[[str], None] | None = None,
) -> BuildSummary:
    """Carries out `recipe` below `output`; goes on where a killed or stopped run was.

    said: told of every stage as it begins. Raises UserError where a stage has decided something with other options, for
    that cannot be taken back; BadDataError where the outcome does not verify.
    """
    output = Path(output)
    _check_named(recipe)
    output.mkdir(parents=True, exist_ok=True)
    with file_lock(output / ".lock", wait=False) as mine:
        if not mine:
            raise UserError(f"another run is building {output}; wait for it")
        remove_leftovers(output)
        run = _Build(output, said)
        sets: list[SetPath] = []
        for source in recipe.sources:
            sets.append(_source(run, source, output, workers, progress))
        if recipe.filter is not None:
            named = {name: Path(path) for name, path in recipe.filter.scores.items()}
            if not all(run.is_done(f"filter {source.name}") for source in recipe.sources):
                for source, one in zip(recipe.sources, sets, strict=True):  # before the first set is decided about
                    check_rules(one, recipe.filter.rules, named.get(source.name), memory_gb)
            for source, one in zip(recipe.sources, sets, strict=True):
                path = named.get(source.name)
                options: dict[str, Any] = {"rules": recipe.filter.rules.as_json(), "scores": path and file_sha256(path)}
                with run.stage(f"filter {source.name}", options, partial(_decided, [one])) as stage:
                    if stage.due:
                        stage.starts(_used(one))
                        filter_set(
                            one.folder, recipe.filter.rules, index_folder=one.index_folder, scores=path,
                            memory_gb=memory_gb, progress=progress,
                        )  # fmt: skip
                        stage.ends(_used(one), {})
        if recipe.takedown is not None:
            wanted = Path(recipe.takedown.list)
            options = {"list": file_sha256(wanted), "erase": recipe.takedown.erase}
            with run.stage("takedown", options, partial(_decided, sets)) as stage:
                if stage.due:
                    stage.starts(sum(map(_used, sets)))
                    take_down(
                        sets,
                        wanted,
                        erase=recipe.takedown.erase,
                        workers=workers,
                        memory_gb=memory_gb,
                        progress=progress,
                    )
                    stage.ends(sum(map(_used, sets)), {})
        if recipe.dedup is not None:
            against = [SetPath(Path(path)) for path in recipe.dedup.against]
            seen = [open_settled(path).revision for path in against]
            options = {"rules": asdict(recipe.dedup.rules), "against": seen}
            with run.stage("dedup", options, partial(_decided, sets)) as stage:
                if stage.due:
                    stage.starts(sum(map(_used, sets)))
                    dedup_sets(
                        sets,
                        recipe.dedup.rules,
                        against=against,
                        workers=workers,
                        memory_gb=memory_gb,
                        progress=progress,
                    )
                    stage.ends(sum(map(_used, sets)), {})
        final = output / "shards"
        with run.stage("shards", recipe.shards.model_dump(), (final / PLAN).exists) as stage:
            if stage.due:
                stage.starts(sum(map(_used, sets)))
                running = Running(workers=workers, memory_gb=memory_gb, progress=progress)
                merge_sets(
                    sets, final, samples_per_shard=recipe.shards.samples_per_shard, shuffle=recipe.shards.shuffle,
                    running=running,
                )  # fmt: skip
                stage.ends(_used(SetPath(final)), {})
        with run.stage("verify", recipe.verify.model_dump(), lambda: False, repeatable=True) as stage:
            if stage.due:
                checked = verify(final, decode=recipe.verify.decode, progress=progress)
                if not checked.sound:
                    first = checked.problems[0]
                    raise BadDataError(
                        f"{final}: {checked.problem_count} problems, the first in {first.shard}: {first.what}; delete "
                        "the folder and build again"
                    )
                stage.starts(checked.samples)
                stage.ends(checked.samples, {})
        made = open_settled(SetPath(final))
        return BuildSummary(output, tuple(run.steps), made.samples, len(made.shards))


def _source(
    run: "_Build", source: SourceRecipe, output: Path, workers: int | None, progress: ProgressCallback | None
) -> SetPath:
    folder = output / "sources" / source.name
    options = source.model_dump(mode="json", exclude={"web", "retries", "retry"}) | {"input": _input(source)}
    if source.set is not None:
        options["input"] = source.set  # decisions change its files
        path = SetPath(Path(source.set), folder if not (Path(source.set) / SET_MANIFEST).exists() else None)
        with run.stage(f"source {source.name}", options, lambda: False) as stage:
            if stage.due:
                found = stats(path.folder, index_folder=path.index_folder, progress=progress)
                stage.starts(found.rows)
                stage.ends(found.packed, found.rejected)
        return path
    with run.stage(f"source {source.name}", options, (folder / PLAN).exists) as stage:
        if stage.due:
            for attempt in range(1 + source.retries):
                retry = source.retry if attempt else ()
                if source.fetch is not None:
                    done: Any = fetch(
                        source.fetch, folder, columns=source.columns, format=source.table, rules=source.images,
                        captionless=source.captionless, web=source.web, retry=retry,
                        rows_per_shard=source.rows_per_shard, workers=workers, progress=progress,
                    )  # fmt: skip
                else:
                    assert source.pack is not None
                    done = pack(
                        source.pack, folder, columns=source.columns, format=source.table, labels=source.labels,
                        rules=source.images, captionless=source.captionless, retry=retry,
                        rows_per_shard=source.rows_per_shard, workers=workers, progress=progress,
                    )  # fmt: skip
                if not source.retry:
                    break
            check_usable(done)
            stage.starts(done.rows)
            stage.ends(done.packed, done.rejected)
    return SetPath(folder)


def _check_named(recipe: Recipe) -> None:
    """Raises UserError for what later stages need and is not there, before the first one takes its hours."""
    for name, path in {} if recipe.filter is None else recipe.filter.scores.items():
        if not Path(path).is_file():
            raise UserError(f"filter.scores.{name}: no such file {path}; correct the recipe")
    if recipe.takedown is not None:
        read_list(Path(recipe.takedown.list))
    for path in () if recipe.dedup is None else recipe.dedup.against:
        open_settled(SetPath(Path(path)))


def _decided(sets: Sequence[SetPath]) -> list[str] | None:
    """Tells what was decided about each set; None where a decision is half done. The first one that is written down
    changes it."""
    try:
        return [open_settled(path).revision for path in sets]
    except UserError:
        return None


def _input(source: SourceRecipe) -> str:
    """Tells one input from another: a file by its digest, a folder by names, sizes and times, a URL by itself."""
    where = Path(source.fetch or source.pack or source.set or "")
    if where.is_dir():
        return folder_digest(where, sorted(path for path in where.rglob("*.*") if path.is_file()))
    return file_sha256(where) if where.is_file() else str(where)


def _used(path: SetPath) -> int:
    """Counts the samples of a set that are used, from its sidecars."""
    return stats(path.folder, index_folder=path.index_folder).packed


class _Stage:
    """A stage under way. `due`: whether there is anything to do. Its rows are written down as soon as they are known,
    for a run that goes on in the middle of a stage finds the rest."""

    def __init__(self, build: "_Build", name: str, due: bool) -> None:
        self.name, self.due = name, due
        self._build = build

    def starts(self, rows: int) -> None:
        self._build.note(self.name, rows=rows)

    def ends(self, left: int, lost: Mapping[str, int]) -> None:
        self._build.note(self.name, left=left, lost=dict(lost))


class _Build:
    """The record of a build."""

    def __init__(self, output: Path, said: Callable[[str], None] | None) -> None:
        self._path, self._said = output / _RECORD, said
        self._record: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            self._record = json.loads(self._path.read_bytes())
        self._identity = ""
        self.steps: list[Step] = []

    def is_done(self, name: str) -> bool:
        return bool(self._record.get(name, {}).get("done"))

    @contextmanager
    def stage(
        self, name: str, options: Mapping[str, Any], decided: Callable[[], object], *, repeatable: bool = False
    ) -> Iterator[_Stage]:
        """Yields the stage; its identity is that of its options and of all stages before it.

        decided: tells what the stage changes with the first thing that it does for good, None where nobody can tell;
        one that was begun and has done nothing may be begun anew with other options. A repeatable one may always be.
        """
        content = json.dumps([self._identity, name, options], sort_keys=True, default=str)
        self._identity = hashlib.sha256(content.encode()).hexdigest()
        known = self._record.get(name)
        if known is not None and known["identity"] != self._identity:
            undone = not self.is_done(name) and known.get("before") is not None and known["before"] == decided()
            if not repeatable and not undone:
                raise UserError(
                    f"stage {name!r} of {self._path.parent} was begun with other options, or after other stages; what "
                    "it decided cannot be taken back: run with the former recipe, or build into another folder"
                )
            del self._record[name]
            known = None
        due = known is None or not known.get("done")
        if due:
            if self._said is not None:
                self._said(name)
            if known is None:
                self.note(name, identity=self._identity, before=decided())
        yield _Stage(self, name, due)
        self.note(name, done=True)
        entry = self._record[name]
        self.steps.append(Step(name, entry["rows"], entry["left"], entry["lost"], skipped=not due))

    def note(self, name: str, **values: Any) -> None:
        """Writes something down about a stage; the number of rows that came in stays what was first said."""
        entry = self._record.setdefault(name, {})
        fresh = {key: value for key, value in values.items() if key != "rows" or "rows" not in entry}
        if any(entry.get(key) != value for key, value in fresh.items()):
            entry |= fresh
            write_durably(self._path, json.dumps(self._record, indent=1) + "\n")
