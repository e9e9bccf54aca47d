"""`internimage shards fetch`: makes shards from a list of URLs, with a status for every row.

    table  ->  shard of rows  ->  fetch, prepare (many at once)  ->  write the shard as one act
                     two shards are under way at a time, so that one slow host does not hold up all others

A row's shard and place come from its number. A run that was killed goes on with the shards it had not finished; a run
with `retry` asks again for failed rows of these reasons alone, and writes a shard anew only where that changed a row.
"""

import asyncio
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.durable import file_sha256
from data_pipeline.errors import UserError
from data_pipeline.executors.processes import available
from data_pipeline.format import ShardEntry
from data_pipeline.format.sidecar import TAKEN_DOWN
from data_pipeline.preparation.fetching.web import Web, WebRules
from data_pipeline.preparation.packing.images import ImageRules, prepare
from data_pipeline.preparation.packing.output import hold_output
from data_pipeline.preparation.packing.pack import (
    count_rows,
    finish,
    numbered,
    run_plan,
    sample_of,
    survey,
    with_image,
)
from data_pipeline.preparation.packing.samples import Sample, check_rows_per_shard, pack_shard, read_entry, read_samples
from data_pipeline.preparation.sources.rows import Columns, Row, read_table, resolve, table_kind

_SHARDS_UNDER_WAY = 2


@dataclass(frozen=True)
class FetchSummary:
    """What became of the input: rows = packed + the sum of `rejected`."""

    output: Path
    rows: int
    packed: int
    rejected: Mapping[str, int]
    shards: int
    shards_found: int  # finished by an earlier run, and left as they were by this one
    requests: int  # of this run, robots.txt apart
    retried: int  # rows asked for again because of `retry`
    classes: int
    bytes: int
    seconds: float
    images_per_second: float  # packed by this run


@dataclass
class _Tally:
    """Counts what one run has done."""

    total: int
    done: int = 0
    packed: int = 0
    requests: int = 0
    retried: int = 0
    untouched: int = 0
    entries: dict[int, ShardEntry] = field(default_factory=dict)


def fetch(
    table: Path,
    output: Path,
    *,
    columns: Columns | None = None,
    classes: Sequence[str] | None = None,
    rules: ImageRules | None = None,
    web: WebRules | None = None,
    retry: Sequence[str] = (),
    rows_per_shard: int = 1000,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> FetchSummary:
    """Fetches the images that a CSV, TSV, Parquet or text table (one URL a line) names, into the set `output`.

    columns: of the table, by role; classes: as in `pack`; rules: what is done with the images
    web: how the network is used; may change from run to run
    retry: reasons (`timeout`, `http_5*`, ...) whose rows are asked for again in shards that are finished
    workers: threads that decode; default: one a core
    Raises UserError for what cannot be fetched at all; a row that cannot is recorded in its sidecar, never raised.
    """
    started = time.monotonic()
    table, output, rules, web = Path(table), Path(output), rules or ImageRules(), web or WebRules()
    check_rows_per_shard(rows_per_shard)
    if table_kind(table) is None or table.is_dir():
        raise UserError(f"{table} is no .csv, .tsv, .parquet or .txt table of URLs; give one of these")
    columns = resolve(table, columns or Columns(), needs="url")
    columns = replace(columns, image=None)  # a column of local paths may stand beside the URLs
    number_of_rows, names = survey(read_table(table, columns), classes)
    if number_of_rows == 0:
        raise UserError(f"{table} holds no rows to fetch; check the file")
    source = {"sha256": file_sha256(table), "columns": asdict(columns)}
    plan = run_plan("fetch", source, number_of_rows, rows_per_shard, names, rules)
    tally = _Tally(number_of_rows)
    with hold_output(output, plan):
        run = _Run(output, names, rules, web, tuple(retry), rows_per_shard, tally, progress)
        rows = numbered(read_table(table, columns), names)
        try:
            asyncio.run(run.all(rows, available() if workers is None else workers))
        except* (OSError, UserError) as group:  # a full disk, a damaged sidecar: the first error names the cause
            raise group.exceptions[0] from None
        entries = [tally.entries[number] for number in sorted(tally.entries)]
        finish(output, entries, names)
    seconds = time.monotonic() - started
    return FetchSummary(
        **count_rows(output, entries, names),
        shards_found=tally.untouched,
        requests=tally.requests,
        retried=tally.retried,
        seconds=seconds,
        images_per_second=tally.packed / max(seconds, 1e-9),
    )


@dataclass
class _Run:
    output: Path
    classes: tuple[str, ...] | None
    rules: ImageRules
    web: WebRules
    retry: tuple[str, ...]
    rows_per_shard: int
    tally: _Tally
    progress: ProgressCallback | None

    async def all(self, rows: Iterator[Row], workers: int) -> None:
        """Makes every shard, in order, two at a time."""
        turns = asyncio.Semaphore(_SHARDS_UNDER_WAY)
        with ThreadPoolExecutor(max(1, workers)) as self.threads:
            async with Web(self.web, self.rules) as self.session, asyncio.TaskGroup() as tasks:
                for number, group in itertools.groupby(rows, key=lambda row: row.number // self.rows_per_shard):
                    shard = list(group)
                    await turns.acquire()
                    tasks.create_task(self.shard(number, shard)).add_done_callback(lambda _: turns.release())

    async def shard(self, number: int, rows: list[Row]) -> None:
        """Makes one shard, or leaves it alone, or makes it anew with the rows that `retry` asks for."""
        entry = read_entry(self.output, number)
        if entry is None:
            samples = await asyncio.gather(*(self.row(row) for row in rows))
            self.tally.packed += sum(sample.image is not None for sample in samples)
        else:
            found = read_samples(self.output, entry) if self.retry else []
            again = [place for place, sample in enumerate(found) if sample.image is None and self._retries(sample)]
            self._step(len(rows) - len(again))
            fresh = await asyncio.gather(*(self.row(rows[place]) for place in again))
            self.tally.retried += len(again)
            self.tally.packed += sum(sample.image is not None for sample in fresh)
            samples = list(found)
            for place, sample in zip(again, fresh, strict=True):
                samples[place] = sample
            if samples == found:
                self.tally.untouched += 1
                self.tally.entries[number] = entry
                return
        first = number * self.rows_per_shard
        write = asyncio.to_thread(pack_shard, self.output, number, first, samples, classes=self.classes)
        self.tally.entries[number] = await write

    async def row(self, row: Row) -> Sample:
        """Fetches and prepares one input row."""
        sample = sample_of(row)
        if not row.reason:
            fetched = await self.session.fetch(row.url)
            self.tally.requests += fetched.asked
            if fetched.data is None:
                sample = replace(sample, reason=fetched.reason, width=fetched.width, height=fetched.height)
            else:
                loop = asyncio.get_running_loop()
                image = await loop.run_in_executor(self.threads, prepare, fetched.data, self.rules)
                sample = with_image(sample, image)
                if sample.image is not None:
                    sample = replace(sample, fields={"status": "success"})  # as img2dataset's readers expect it
        self._step(1)
        return sample

    def _retries(self, sample: Sample) -> bool:
        if sample.reason.startswith(TAKEN_DOWN):
            return False
        return any(fnmatchcase(sample.reason, pattern) for pattern in self.retry)

    def _step(self, rows: int) -> None:
        self.tally.done += rows
        if self.progress is not None and rows:
            self.progress(self.tally.done, self.tally.total)
