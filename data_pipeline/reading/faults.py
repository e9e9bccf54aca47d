"""Counts and records bad samples, and raises where there are too many."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from data_pipeline.callbacks import EventSink
from data_pipeline.errors import BadDataError
from data_pipeline.hashing import Integers
from data_pipeline.reading.events import BAD_SAMPLE, DAMAGED_SHARD, INCOMPLETE_SAMPLE

_NAMED = 8  # shards in a message
REMEDY = "Look at the shards with `internimage shards verify`, repair or drop them, or raise data.max_bad_rate"
STREAM_DAMAGED = "stream_damaged"  # the reason of a fault that concerns no sample


class Fault(NamedTuple):
    """Something to record about a row. `replaced_by` is (shard, key), or None where the sample was used as it is."""

    position: int
    source: str
    shard: str
    key: str
    row: int
    reason: str
    detail: str
    replaced_by: tuple[str, str] | None


def too_many(bad: int, seen: int, rate: float) -> bool:
    """Tells whether `bad` of `seen` are clearly over `rate`: three standard deviations and two samples above
    the rate, so that neither chance nor a few bad samples at the start end a run. A rate of 0 allows none."""
    if rate == 0:
        return bad > 0
    expected = rate * seen
    return bad > expected + 3 * math.sqrt(expected) + 2


class FaultLog:
    """Counts the faults in the batches that were consumed. `events` gets one dictionary a fault.

    `repeats`: whether batches that are asked for again, after a return to an earlier step, are the same; each counts
    and is recorded once then.
    """

    def __init__(self, max_bad_rate: float, events: EventSink | None, *, repeats: bool = True) -> None:
        self.seen = self.bad = 0
        self.replaced: Counter[str] = Counter()  # samples by source
        self._shards: Counter[tuple[str, str, str]] = Counter()
        self._rate, self._events, self._repeats = max_bad_rate, events, repeats
        self._last = -1  # highest position that was counted

    def add(self, step: int, positions: Integers, faults: Iterable[Fault]) -> None:
        """Counts and records one consumed batch, whose positions and faults rise."""
        if self._repeats:
            if int(positions[-1]) <= self._last:
                return
            self._last = int(positions[-1])
        self.seen += len(positions)
        bad: dict[int, str] = {}  # position -> source; a position may have several faults
        for fault in faults:
            if fault.replaced_by is not None:
                bad[fault.position] = fault.source
                self._shards[fault.source, fault.shard, fault.reason] += 1
            if self._events is not None:
                self._events(_event(step, fault))
        self.bad += len(bad)
        self.replaced.update(bad.values())

    def check(self) -> None:
        """Raises BadDataError above the allowed rate, naming the shards."""
        if self.too_many(self.seen, self.bad):
            raise self.error(self.seen, self.bad, [self.worst()])

    def too_many(self, seen: float, bad: float) -> bool:
        """Tells whether `bad` of `seen`, over all ranks, are above the allowed rate."""
        return bad > 0 and too_many(int(bad), int(seen), self._rate)

    def worst(self) -> list[tuple[tuple[str, str, str], int]]:
        """Returns the (source, shard, reason) with the most bad samples."""
        return self._shards.most_common(_NAMED)

    def error(
        self, seen: float, bad: float, worst: Iterable[Iterable[tuple[tuple[str, str, str], int]]]
    ) -> BadDataError:
        """Makes the error to raise. worst: of each rank."""
        shards = sum((Counter(dict(rank)) for rank in worst), Counter[tuple[str, str, str]]())
        named = "; ".join(
            f"{source}/{shard}: {count} x {reason}" for (source, shard, reason), count in shards.most_common(_NAMED)
        )
        return BadDataError(
            f"{int(bad)} of {int(seen)} samples read were bad, above data.max_bad_rate {self._rate}: {named}. {REMEDY}"
        )


def _event(step: int, fault: Fault) -> dict[str, Any]:
    if fault.reason == STREAM_DAMAGED:
        shard = {"shard": fault.shard, "reason": fault.reason, "detail": fault.detail, "samples": 1}
        return {"kind": DAMAGED_SHARD, "step": step, "source": fault.source, **shard}
    said = fault._asdict()
    if fault.replaced_by is None:
        del said["replaced_by"]
        return {"kind": INCOMPLETE_SAMPLE, "step": step, **said}
    shard_name, key = fault.replaced_by
    return {"kind": BAD_SAMPLE, "step": step, **said, "replaced_by": {"shard": shard_name, "key": key}}
