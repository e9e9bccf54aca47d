"""What the steps of the GPU check share: results that outlive the step, whatever becomes of it.

    results.json    {"machine": {...}, "steps": {STEP: {"outcome", "seconds", "headline", "rows": [{...}, ...]}}}

A row is on the disk before `record` returns. A step adds rows and a headline; outcome and seconds are the runner's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

OUT = "CHECK_OUT"  # environment: the file of results; unset where a step is run alone, which then only prints
SMALL = "CHECK_SMALL"  # environment: "1" for the form that a CPU runs in seconds
NOT_HERE = 77  # exit status of a step that this machine cannot run

Results = dict[str, Any]


def small() -> bool:
    """Whether the reduced form is asked for, by the runner or by --small."""
    return os.environ.get(SMALL) == "1" or "--small" in sys.argv[1:]


def record(step: str, row: dict[str, Any]) -> None:
    """Append a row to the step's results and print it."""
    print(json.dumps(row), flush=True)
    _change(step, lambda its: its["rows"].append(row))


def headline(step: str, text: str) -> None:
    """The few words that the table shows for the step; the last ones count."""
    print(text, flush=True)
    _change(step, lambda its: its.update(headline=text))


def describe(about: dict[str, Any]) -> None:
    """The record of the machine, at the results' head."""
    print(json.dumps(about), flush=True)
    name = os.environ.get(OUT)
    if name:
        results = read(Path(name))
        results["machine"] = about
        write(Path(name), results)


def not_here(step: str, reason: str) -> NoReturn:
    """End the step as one that this machine cannot run, which is no failure."""
    headline(step, reason)
    raise SystemExit(NOT_HERE)


def read(file: Path) -> Results:
    """The results so far; empty ones where there are none that can be read."""
    try:
        results = json.loads(file.read_text())
    except (OSError, ValueError):
        return {"machine": {}, "steps": {}}
    return results


def write(file: Path, results: Results) -> None:
    """Replace the file by a whole one that is on the disk: a reader never sees half of it."""
    part = file.with_name(file.name + ".part")
    with part.open("w") as stream:
        json.dump(results, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def entry(results: Results, step: str) -> dict[str, Any]:
    """The step's part of the results, made where it is missing."""
    return results["steps"].setdefault(step, {"outcome": "", "seconds": 0.0, "headline": "", "rows": []})


def _change(step: str, change: Callable[[dict[str, Any]], object]) -> None:
    name = os.environ.get(OUT)
    if name:
        results = read(Path(name))
        change(entry(results, step))
        write(Path(name), results)
