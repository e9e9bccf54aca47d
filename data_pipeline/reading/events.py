"""Reads back what a run has recorded about its samples. A run that resumes or rolls back reads samples again and
records their events again; here each event counts once."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# Kinds of events
BAD_SAMPLE = "bad_sample"  # replaced by another
INCOMPLETE_SAMPLE = "incomplete_sample"  # used without something
DAMAGED_SHARD = "damaged_shard"
INEXACT_ORDER = "inexact_order"

_WHAT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((BAD_SAMPLE, INCOMPLETE_SAMPLE), ("step", "position", "source", "shard", "key", "row", "reason")),
    DAMAGED_SHARD: ("source", "shard", "reason", "samples"),
}


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects of a .jsonl file, one a line; skips a line that a crash cut, and a missing file."""
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError):
                if isinstance(found := json.loads(line), dict):
                    yield found


def without_repeats(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Drops events that repeat what an earlier event said of a sample or shard."""
    told: set[tuple[Any, ...]] = set()
    for event in events:
        what = _WHAT.get(str(event.get("kind")))
        if what is not None:
            identity = (event["kind"], *(str(event.get(name)) for name in what))
            if identity in told:
                continue
            told.add(identity)
        yield event


def count_replaced(events: Iterable[Mapping[str, Any]], before_step: int) -> dict[str, int]:
    """Counts the samples replaced before a step, by source: positions, however many tries each took."""
    places = {
        (str(event.get("source")), event.get("position"))
        for event in events
        if event.get("kind") == BAD_SAMPLE and isinstance(event.get("step"), int) and event["step"] < before_step
    }
    return dict(Counter(source for source, _ in places))
