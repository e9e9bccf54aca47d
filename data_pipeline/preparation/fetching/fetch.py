"""`internimage shards fetch`: makes shards from a list of URLs, with a status for every row.

    table  ->  shards of rows  ->  fetch, prepare  ->  spill (disk)  ->  write the shard as one act
               many under way, so that slow servers hold up no others; their results wait on disk

A row's shard and place come from its number. A run that was killed goes on with the rows it had not fetched; a run
with `retry` asks again for failed rows of these reasons alone, and writes a shard anew only where that changed a row.
"""

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from data_pipeline.callbacks import Notice, ProgressCallback
from data_pipeline.errors import StoppedError, UserError
from data_pipeline.executors.processes import available
from data_pipeline.executors.units import Part, stop_requests
from data_pipeline.format import ShardEntry
from data_pipeline.preparation.fetching.mixing import Shard, in_keyed_order
from data_pipeline.preparation.fetching.shared import HOSTS_FOLDER, NoLocksError, SharedHosts
from data_pipeline.preparation.fetching.spill import Spill
from data_pipeline.preparation.fetching.web import Fetched, Web, WebRules
from data_pipeline.preparation.packing.away import Away
from data_pipeline.preparation.packing.checking import checked_fetched
from data_pipeline.preparation.packing.decoders import decoders
from data_pipeline.preparation.packing.output import check_part, hold_output, part_folder, part_plan
from data_pipeline.preparation.packing.pack import count_rows, finish, run_plan, shard_numbers
from data_pipeline.preparation.packing.retries import merged, unchanged, wanted_again
from data_pipeline.preparation.packing.rows import Captionless, sample_of, with_image
from data_pipeline.preparation.packing.rules import ImageRules
from data_pipeline.preparation.packing.samples import Sample, check_rows_per_shard, pack_shard, read_entry, shard_stem
from data_pipeline.preparation.packing.staging import DECODER_DIED
from data_pipeline.preparation.sources.columns import Columns, TableFormat
from data_pipeline.preparation.sources.labels import numbered, survey
from data_pipeline.preparation.sources.opening import open_urls
from data_pipeline.preparation.sources.rows import Row, Source

_ROWS_UNDER_WAY = 16_384  # rows of all shards that are under way; what memory is needed for
_COLLECTED_OBJECTS = 10_000  # new ones, between two collections of cyclic garbage


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
    part: Part | None = None,
    away: Away | None = None,
    mix: int | None = None,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    notice: Notice | None = None,
) -> FetchSummary:
    """Fetches the images that a table names (or a text file with one URL a line) into the set `output`.

    table: one file, a folder of parts, or the URL of one; columns, format: as in `pack`, and so are classes, rules,
    captionless and notice
    web: how the network is used; may change from run to run
    away: as in `pack`
    part: as in `pack`; parts that run at a time share the requests to one host and what its robots.txt says
    mix: fetches the shards in an order drawn from this number, for a list sorted by host; may change from run to run
    retry: reasons (`timeout`, `http_5*`, ...) whose rows are asked for again in shards that are finished
    workers: processes that decode; default: one a core; with one, a thread of this process does
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
    if part is not None:
        check_part(output, part)
    plan = part_plan(plan | {"captionless": captionless}, part)
    whole, output = output, part_folder(output, part)
    numbers = shard_numbers(number_of_rows, rows_per_shard, part)
    tally = _Tally(min(number_of_rows, numbers.stop * rows_per_shard) - numbers.start * rows_per_shard)
    with ExitStack() as held:
        held.enter_context(hold_output(output, plan))
        stopping = held.enter_context(stop_requests())
        held.enter_context(_rare_collections())
        shared = None
        if part is not None:
            try:
                shared = held.enter_context(closing(SharedHosts(whole / HOSTS_FOLDER, web.per_host, web.token)))
            except NoLocksError:  # then each part has its share, whether or not the others run
                web = replace(web, per_host=max(1, web.per_host // part.count))
        run = _Run(
            output,
            source,
            names,
            rules,
            captionless,
            tuple(retry),
            rows_per_shard,
            tally,
            progress,
            numbers,
            stopping,
            mix,
            away,
        )
        try:
            asyncio.run(run.all(Web(web, rules, shared), available() if workers is None else workers))
        except* (OSError, UserError) as group:  # a full disk, a damaged sidecar: the first error names the cause
            raise group.exceptions[0] from None
        if len(tally.entries) < len(numbers):
            raise StoppedError(f"stopped behind the shards under way, as asked; the same command goes on in {output}")
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


class _Run:
    """One run of `fetch`: what all its shards share."""

    def __init__(
        self,
        output: Path,
        source: Source,
        classes: tuple[str, ...] | None,
        rules: ImageRules,
        captionless: Captionless,
        retry: tuple[str, ...],
        rows_per_shard: int,
        tally: _Tally,
        progress: ProgressCallback | None,
        numbers: range,
        stopping: Callable[[], bool],
        mix: int | None,
        away: Away | None,
    ) -> None:
        self._numbers, self._stopping, self._mix, self._away = numbers, stopping, mix, away
        self._output, self._source, self._classes, self._retry = output, source, classes, retry
        self._rules, self._captionless, self._rows_per_shard = rules, captionless, rows_per_shard
        self._tally, self._progress = tally, progress

    async def all(self, web: Web, workers: int) -> None:
        """Makes every shard; as many are under way as their rows allow."""
        turns = asyncio.Semaphore(max(2, _ROWS_UNDER_WAY // self._rows_per_shard))
        first, end = (number * self._rows_per_shard for number in (self._numbers.start, self._numbers.stop))
        rows = numbered(itertools.islice(self._source.rows(), first, end), self._classes)
        shards: Iterator[Shard] = itertools.groupby(rows, key=lambda row: row.number // self._rows_per_shard)
        if self._mix is not None:
            shards = in_keyed_order(shards, self._mix, self._source.further, self._output)
        work = partial(checked_fetched, rules=self._rules)
        async with web, decoders(work, workers) as self._decoders, asyncio.TaskGroup() as tasks:
            while not self._stopping() and (shard := await asyncio.to_thread(_next, shards)) is not None:
                await turns.acquire()
                tasks.create_task(self._shard(web, *shard)).add_done_callback(lambda _: turns.release())

    async def _shard(self, web: Web, number: int, rows: list[Row]) -> None:
        """Makes one shard, or leaves it alone, or makes it anew with the rows that `retry` asks for."""
        entry = read_entry(self._output, number)
        spilled = self._output / f".{shard_stem(number)}.spill"
        if entry is None:
            again = None
            due = rows
        else:
            if self._away is not None:  # where a killed run had written it and not sent it
                await asyncio.to_thread(self._away.send, self._output, entry)
            again = wanted_again(self._output, entry, self._retry) if self._retry else {}
            due = [row for row in rows if row.number in again]
            self._step(len(rows) - len(due))
            if not due:
                spilled.unlink(missing_ok=True)  # left by a kill behind the shard's last rename
                self._tally.untouched += 1
                self._tally.entries[number] = entry
                return
        spill = Spill(spilled, fresh=again is not None)
        done = False
        try:
            await _all_or_none([asyncio.create_task(self._row(web, row, spill)) for row in due])
            if again is not None:
                self._tally.retried += len(again)
            self._tally.entries[number] = await asyncio.to_thread(self._write, number, rows, due, spill, entry, again)
            done = True
        finally:
            spill.close(done=done)

    def _write(
        self,
        number: int,
        rows: list[Row],
        due: list[Row],
        spill: Spill,
        entry: ShardEntry | None,
        again: dict[int, str] | None,
    ) -> ShardEntry:
        """Writes a shard from the results of its due rows; an earlier one only where they are other ones."""
        samples = spill.results(sample_of(row, self._captionless) for row in due)
        if entry is not None and again is not None:
            fresh = {sample.row: sample for sample in samples}
            if unchanged(again, fresh):
                self._tally.untouched += 1
                return entry
            if self._away is not None:
                self._away.bring_back(self._output, entry)
            samples = merged(self._output, entry, fresh)
        first, further = number * self._rows_per_shard, self._source.further
        made = pack_shard(self._output, number, first, samples, classes=self._classes, further=further)
        if self._away is not None:
            self._away.send(self._output, made)
        return made

    async def _row(self, web: Web, row: Row, spill: Spill) -> None:
        """Fetches and prepares one input row, unless an earlier run has."""
        if row.number not in spill:
            sample = sample_of(row, self._captionless)
            if sample.reason:
                spill.add(sample)
            else:
                found = await web.fetch(row.url)
                self._tally.requests += found.asked
                try:
                    spill.add(await self._sample(sample, found, row.expected))
                finally:
                    web.release(found)
            self._tally.packed += spill.is_packed(row.number)
        self._step(1)

    async def _sample(self, sample: Sample, found: Fetched, expected: str | None) -> Sample:
        if found.data is None:
            return replace(sample, reason=found.reason, width=found.width, height=found.height)
        made = await self._decoders.do((found.data, expected))
        if made is None:
            return replace(sample, reason=DECODER_DIED)
        return with_image(sample, made, fields={"status": "success"})  # as img2dataset has it

    def _step(self, rows: int) -> None:
        self._tally.done += rows
        if self._progress is not None and rows:
            self._progress(self._tally.done, self._tally.total)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Has Python look for cyclic garbage less often: it would go over all rows under way, and find next to none."""
    before = gc.get_threshold()
    gc.set_threshold(_COLLECTED_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


async def _all_or_none(tasks: list[asyncio.Task[None]]) -> None:
    """Waits for all tasks; where one fails, or the caller is cancelled, the others end before the error goes on."""
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _next(shards: Iterator[Shard]) -> tuple[int, list[Row]] | None:
    """Reads the rows of the next shard."""
    found = next(shards, None)
    return None if found is None else (found[0], list(found[1]))
