"""Many rows in little memory. The numbers of the last run stand in tests/long_runs.json and docs/curation.md."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import COPIES, images_of, sides

from data_pipeline.curation.bands import choose_bands, expected_recall

ROOT = Path(__file__).resolve().parents[2]


def python(script: str, *words: object) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "rows",
    [
        40_000,
        pytest.param(5_000_000, marks=[pytest.mark.long, pytest.mark.timeout(7200)]),
        pytest.param(50_000_000, marks=[pytest.mark.long, pytest.mark.timeout(36000)]),
    ],
)
def test_rows_are_planned_filtered_and_deduplicated(rows: int, tmp_path: Path, record_property: Callable) -> None:
    free = shutil.disk_usage(tmp_path).free
    if free < 300 * rows:
        pytest.skip(f"{300 * rows / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} are free")
    folder = tmp_path / "set"
    python("synthetic.py", folder, rows)
    told: dict[str, dict[str, Any]] = {}
    for stage in ("plan", "filter", "exact", "near"):
        if stage == "near" and rows > 10_000_000:
            continue  # measured apart: hours
        told[stage] = json.loads(python("scale_run.py", folder, stage))
        figures = {name: told[stage][name] for name in ("seconds", "cpu_seconds", "peak_gb")}
        print(stage, figures)
        record_property(stage, figures)
        if stage != "near":
            assert told[stage]["peak_gb"] < 2
    assert told["plan"]["units"] == rows // 10_000
    numbers = np.arange(rows)
    kept = numbers[(np.minimum(*sides(numbers)) >= 210) & (numbers % 100 != 3)]
    assert told["filter"]["left"] == len(kept)
    copies = len(kept) - len(np.unique(images_of(kept)))
    assert told["exact"]["exact"] == copies, "all of them, and no other"
    if "near" in told:
        near = np.count_nonzero(kept % COPIES == 2)  # of which some lack their original, which was filtered out
        recall, stated = told["near"]["near"] / near, expected_recall(choose_bands(rows), 20)
        print(f"near copies of at most 20 bits: {recall:.3f} found, {stated:.3f} of those at 20 bits expected")
        assert 0.95 * stated < recall < 1.01
