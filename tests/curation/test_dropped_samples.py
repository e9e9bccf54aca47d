"""Dropped and erased samples: their places in the order stay, others stand in, nothing counts as bad."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from curation_sets import all_rows, encoded, member, photo

from data_pipeline.curation.catalogue import open_catalogue
from data_pipeline.curation.decisions import SetPath, decide, held_sets
from data_pipeline.errors import BadDataError
from data_pipeline.format import index_set, open_set, read_manifest
from data_pipeline.preparation import stats, verify
from data_pipeline.reading import DataConfig, ImageText, Reader, evaluation_batches

ROOT = Path(__file__).resolve().parents[2]


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([list(text.encode()[-8:].ljust(8, b"\0")) for text in texts], dtype=torch.int64).reshape(-1, 8)


def mark(folder: Path, keys: Sequence[str], status: str = "dropped", reason: str = "test") -> None:
    """Decides about the rows of these keys, as every command of curation does."""
    with held_sets([SetPath(folder)]) as sets, open_catalogue(sets) as catalogue:
        listed = ", ".join(f"'{key}'" for key in keys)
        select = f"select id, '{status}' as status, '{reason}' as reason from rows where key in ({listed})"
        decide(catalogue, select, [{"what": "test", "dropped": len(keys)}])


def read(folder: Path, steps: int = 6, **settings: Any) -> tuple[str, list[Any], list[dict[str, Any]]]:
    """Fingerprint, [(position, key, pixels)] and events of the first steps."""
    events: list[dict[str, Any]] = []
    config = DataConfig(sources=[{"path": str(folder)}], image_size=32, context_length=8, **({"workers": 0} | settings))
    with Reader(config, ImageText(tokenize, 8), batch_size=10, events=events.append) as reader:
        found = [
            (int(position), sample.key, views.numpy().copy())
            for batch in islice(reader.batches(0), steps)
            for position, sample, views in zip(batch.positions, batch.samples, batch.views, strict=True)
        ]
        return reader.fingerprint, found, events


@pytest.fixture
def pictures(make_set: Callable[..., Path]) -> Path:
    return make_set("pictures", [encoded(photo(n)) for n in range(30)])


@pytest.mark.parametrize("status", ["dropped", "erased"])
def test_places_stay_and_others_stand_in(pictures: Path, status: str) -> None:
    before = read(pictures)
    gone = [row["key"] for row in all_rows(pictures)][3:20:4]
    mark(pictures, gone, status)
    after = read(pictures)
    assert after[0] == before[0], "a running training must be able to go on"
    assert after[2] == [], "dropped samples are no bad ones"
    for (position, key, pixels), (same, found, drawn) in zip(before[1], after[1], strict=True):
        assert position == same and found not in gone
        if key not in gone:
            assert found == key and np.array_equal(pixels, drawn)
    assert [(p, k) for p, k, _ in read(pictures, workers=2)[1]] == [(p, k) for p, k, _ in after[1]]
    checked = verify(pictures)
    assert checked.sound, checked.problems
    counted = stats(pictures)
    assert (counted.packed, counted.dropped, counted.rows) == (30 - len(gone), {"test": len(gone)}, 30)


def test_a_set_of_which_most_is_dropped_still_reads(make_set: Callable[..., Path]) -> None:
    folder = make_set("many", [encoded(photo(n, (20, 20))) for n in range(120)], rows_per_shard=20)
    rows = all_rows(folder)
    kept = {rows[17]["key"], rows[80]["key"]}
    mark(folder, [row["key"] for row in rows if row["key"] not in kept])
    assert {key for _, key, _ in read(folder)[1]} == kept
    mark(folder, list(kept))
    with pytest.raises(BadDataError, match="reshard"):
        read(folder)


def test_dropped_samples_do_not_end_a_run_with_bad_ones(pictures: Path) -> None:
    rows = all_rows(pictures)
    mark(pictures, [row["key"] for row in rows[:20]])
    with open(pictures / rows[25]["shard"], "r+b") as file:
        file.seek(rows[25]["image_offset"] + 60)
        file.write(b"damage")
    _, found, events = read(pictures, max_bad_rate=0.5)
    assert {event["key"] for event in events} == {rows[25]["key"]}
    assert {key for _, key, _ in found} <= {row["key"] for row in rows[20:]} - {rows[25]["key"]}


def test_a_reader_goes_on_over_bytes_erased_meanwhile(pictures: Path) -> None:
    rows = all_rows(pictures)
    config = DataConfig(sources=[{"path": str(pictures)}], image_size=32, context_length=8, workers=0)
    events: list[dict[str, Any]] = []
    with Reader(config, ImageText(tokenize, 8), batch_size=10, events=events.append) as reader:
        batches = reader.batches(0)
        seen = [sample.key for batch in islice(batches, 3) for sample in batch.samples]
        assert sorted(seen) == sorted(row["key"] for row in rows)
        mark(pictures, [row["key"] for row in rows[:15]], "erased")
        later = {sample.key for batch in islice(batches, 9) for sample in batch.samples}
    assert later == {row["key"] for row in rows[15:]} and events == []


def test_erased_bytes_are_zeros_and_what_is_left_of_them_is_told(pictures: Path) -> None:
    before = {row["key"]: row for row in all_rows(pictures)}
    laid_out = {entry.name: entry.sha256 for entry in read_manifest(pictures).shards}
    gone = sorted(before)[4]
    mark(pictures, [gone], "erased", "taken_down: url")
    found = read_manifest(pictures)
    for row in all_rows(pictures):
        for part in ("image", "text", "json"):
            data = member(found, row, part)
            assert (data == bytes(len(data))) == (row["key"] == gone)
    changed = {entry.name: entry for entry in found.shards}[before[gone]["shard"]]
    assert changed.slots == laid_out[changed.name] != changed.sha256
    assert next(row for row in all_rows(pictures) if row["key"] == gone)["caption"] is None
    with open(pictures / changed.name, "r+b") as file:
        file.seek(before[gone]["text_offset"])
        file.write(b"p")
    assert any("still has bytes" in problem.what for problem in verify(pictures).problems)


def test_scores_leave_dropped_samples_out(pictures: Path) -> None:
    keys = [row["key"] for row in all_rows(pictures)]
    mark(pictures, keys[::3])
    batches = list(evaluation_batches(pictures, 32, 8, ImageText(tokenize, 8), max_bad_rate=0.0))
    assert [sample.key for batch in batches for sample in batch.samples] == [k for k in keys if k not in keys[::3]]


def test_decisions_about_foreign_shards_outlive_a_new_index(pictures: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for tar in pictures.glob("*.tar"):
        shutil.copy(tar, foreign / tar.name)
    keys = [row["key"] for row in all_rows(foreign)]
    mark(foreign, keys[2:4])
    mark(foreign, keys[7:9], "erased")
    decided = [(row["key"], row["status"], row["reason"], row["sha256"]) for row in all_rows(foreign)]
    assert sum(status != "packed" for _, status, *_ in decided) == 4
    before = read_manifest(foreign)
    assert verify(foreign).sound and open_set(foreign) == before
    index_set(foreign, foreign, force=True)
    assert [(row["key"], row["status"], row["reason"], row["sha256"]) for row in all_rows(foreign)] == decided
    assert verify(foreign).sound and read_manifest(foreign).history == before.history
    assert [entry.slots for entry in read_manifest(foreign).shards] == [entry.slots for entry in before.shards]


@pytest.mark.parametrize("status", ["dropped", pytest.param("erased", marks=pytest.mark.slow)])
def test_a_stopped_training_goes_on_after_samples_went(tiny_run: Callable[..., Path], status: str) -> None:
    config = tiny_run("training.log_every=1")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def pretrain(*overrides: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "launch", "pretrain", str(config), "--output", "run", *overrides]
        return subprocess.run(command, cwd=config.parent, env=environment, capture_output=True, text=True, timeout=500)

    stopped = pretrain("training.stop_after=5")
    assert stopped.returncode == 75, stopped.stderr
    shards = config.parent / "shards"
    mark(shards, [row["key"] for row in all_rows(shards)][2:14], status)
    done = pretrain()
    assert done.returncode == 0, done.stderr
    lines = (config.parent / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13)), "it went on where it stood"
    kinds = [json.loads(line)["kind"] for line in (config.parent / "run/events.jsonl").read_text().splitlines()]
    assert "bad_sample" not in kinds
