"""What a run has recorded about its samples, read back. A run that resumes or rolls back reads samples again and says
the same of them again: each thing counts once."""

import json
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
    """The JSON objects of a .jsonl file, one a line; of a line that a crash cut, or a file that is not there, none."""
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError):
                if isinstance(found := json.loads(line), dict):
                    yield found


def without_repeats(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The lines of events.jsonl without those that say of a sample or shard what an earlier one said."""
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
    """Samples that were replaced before a step, by source: positions, however many tries each took."""
    places = {
        (str(event.get("source")), event.get("position"))
        for event in events
        if event.get("kind") == BAD_SAMPLE and isinstance(event.get("step"), int) and event["step"] < before_step
    }
    found: dict[str, int] = {}
    for source, _ in places:
        found[source] = found.get(source, 0) + 1
    return found
