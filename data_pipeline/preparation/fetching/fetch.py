"""`internimage shards fetch`: makes shards from a list of URLs, with a status for every row.

    table  ->  shard of rows  ->  fetch, prepare (many at once)  ->  write the shard as one act
                     two shards are under way at a time, so that one slow host does not hold up all others

A row's shard and place come from its number. A run that was killed goes on with the shards it had not finished; a run
with `retry` asks again for failed rows of these reasons alone, and writes a shard anew only where that changed a row.
"""

import asyncio
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_pipeline.callbacks import Notice, ProgressCallback
from data_pipeline.errors import UserError
from data_pipeline.executors.processes import available
from data_pipeline.format import ShardEntry
from data_pipeline.preparation.fetching.web import Web, WebRules
from data_pipeline.preparation.packing.images import ImageRules
from data_pipeline.preparation.packing.output import hold_output
from data_pipeline.preparation.packing.pack import Captionless, count_rows, finish, run_plan, sample_of, with_data
from data_pipeline.preparation.packing.retries import merged, unchanged, wanted_again
from data_pipeline.preparation.packing.samples import Sample, check_rows_per_shard, pack_shard, read_entry
from data_pipeline.preparation.sources.columns import Columns, TableFormat
from data_pipeline.preparation.sources.labels import numbered, survey
from data_pipeline.preparation.sources.opening import open_urls
from data_pipeline.preparation.sources.rows import Row, Source

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
    table: Path | str,
    output: Path,
    *,
    columns: Columns | None = None,
    format: TableFormat | None = None,
    classes: Sequence[str] | None = None,
    rules: ImageRules | None = None,
    captionless: Captionless = "keep",
    web: WebRules | None = None,
    retry: Sequence[str] = (),
    rows_per_shard: int = 1000,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    notice: Notice | None = None,
) -> FetchSummary:
    """Fetches the images that a table names (or a text file with one URL a line) into the set `output`.

    table: one file, a folder of parts, or the URL of one; columns, format: as in `pack`, and so are classes, rules,
    captionless and notice
    web: how the network is used; may change from run to run
    retry: reasons (`timeout`, `http_5*`, ...) whose rows are asked for again in shards that are finished
    workers: threads that decode; default: one a core
    Raises UserError for what cannot be fetched at all; a row that cannot is recorded in its sidecar, never raised.
    """
    started = time.monotonic()
    output, rules, web = Path(output), rules or ImageRules(), web or WebRules()
    check_rows_per_shard(rows_per_shard)
    source = open_urls(str(table), columns or Columns(), format or TableFormat())
    number_of_rows, names = survey(source, classes)
    if number_of_rows == 0:
        raise UserError(f"{table} holds no rows to fetch; check the file")
    if notice is not None:
        notice(source.describe())
    plan = run_plan("fetch", source.identity(), number_of_rows, rows_per_shard, names, rules)
    plan |= {"captionless": captionless}
    tally = _Tally(number_of_rows)
    with hold_output(output, plan):
        run = _Run(output, source, names, rules, captionless, web, tuple(retry), rows_per_shard, tally, progress)
        rows = numbered(source.rows(), names)
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
    source: Source
    classes: tuple[str, ...] | None
    rules: ImageRules
    captionless: Captionless
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
            samples: Iterable[Sample] = await asyncio.gather(*(self.row(row) for row in rows))
        else:
            again = wanted_again(self.output, entry, self.retry) if self.retry else {}
            self._step(len(rows) - len(again))
            fresh = await asyncio.gather(*(self.row(row) for row in rows if row.number in again))
            self.tally.retried += len(again)
            made = {sample.row: sample for sample in fresh}
            if unchanged(again, made):
                self.tally.untouched += 1
                self.tally.entries[number] = entry
                return
            samples = merged(self.output, entry, made)
        self.tally.entries[number] = await asyncio.to_thread(
            pack_shard,
            self.output,
            number,
            number * self.rows_per_shard,
            samples,
            classes=self.classes,
            further=self.source.further,
        )

    async def row(self, row: Row) -> Sample:
        """Fetches and prepares one input row."""
        sample = sample_of(row, self.captionless)
        if not sample.reason:
            fetched = await self.session.fetch(row.url)
            self.tally.requests += fetched.asked
            if fetched.data is None:
                sample = replace(sample, reason=fetched.reason, width=fetched.width, height=fetched.height)
            else:
                loop = asyncio.get_running_loop()
                made = loop.run_in_executor(self.threads, with_data, sample, fetched.data, row.expected, self.rules)
                sample = await made
                if sample.image is not None:
                    self.tally.packed += 1
                    sample = replace(sample, fields={"status": "success"})  # as img2dataset's readers expect it
        self._step(1)
        return sample

    def _step(self, rows: int) -> None:
        self.tally.done += rows
        if self.progress is not None and rows:
            self.progress(self.tally.done, self.tally.total)
