"""Bad data met by a real run of two ranks: recorded and counted below the allowed rate, exit code 3 above it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.format import packed_rows, read_manifest, read_sidecar
from pretrain.analysis.batch import inspect_batch
from pretrain.report.record import read_run

ROOT = Path(__file__).resolve().parents[2]


def pretrain(config: Path, *overrides: str) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(config.parent)}
    command = [sys.executable, "-m", "launch", "pretrain", str(config), "--output", "run", "--processes", "2"]
    return subprocess.run(
        [*command, *overrides], cwd=config.parent, env=environment, capture_output=True, text=True, timeout=300
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_below_the_rate_a_run_ends_0_and_says_what_was_replaced_by_what(tiny_run: Callable[..., Path]) -> None:
    """One of 24 images is damaged: met once in each of the four epochs that 12 steps of 8 make. The run stops and goes
    on once, so that some of its steps may be told of twice."""
    config = tiny_run("training.log_every=1", "checkpoint.every_steps=2")
    shards = read_manifest(config.parent / "shards")
    entry = shards.shards[1]
    row = packed_rows(read_sidecar(shards.sidecar_path(entry))).to_pylist()[4]
    with open(shards.shard_path(entry), "r+b") as file:
        file.seek(row["image_offset"] + 50)
        file.write(b"damage")
    run = config.parent / "run"
    assert pretrain(config, "training.stop_after=5").returncode == 75
    # As if it had been killed after two steps more, whose batches were told of: they come again.
    before = lines(run / "events.jsonl")
    done = pretrain(config)
    assert done.returncode == 0, done.stderr
    with open(run / "events.jsonl", "a") as file:
        file.writelines(json.dumps(event) + "\n" for event in before if event["kind"] == "bad_sample")
    told = [event for event in read_run(run).events if event["kind"] == "bad_sample"]
    assert {(event["shard"], event["key"], event["reason"]) for event in told} == {
        (entry.name, row["key"], "image_damaged")
    }
    assert len(told) == 4 and {event["position"] // 24 for event in told} == {0, 1, 2, 3}
    for logged in lines(run / "metrics.jsonl"):
        step = logged["step"]
        assert logged["data/samples/shards"] == 8 * step and logged["data/epochs/shards"] == 8 * step / 24
        assert logged["data/replaced/shards"] == sum(event["step"] < step for event in told)
    event = told[2]
    found = inspect_batch(run, event["step"])["samples"][event["position"] % 8]
    used = found["replaced_by"]
    assert found["bad"] == "image_damaged" and found["key"] == row["key"] and found["caption"] == row["caption"]
    assert (used["shard"], used["key"]) == (event["replaced_by"]["shard"], event["replaced_by"]["key"])
    assert used["caption"].startswith("picture number ") and used["caption"] != found["caption"]


@pytest.mark.parametrize("steps", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_a_removed_shard_ends_every_rank_with_3_and_is_named(tiny_run: Callable[..., Path], steps: int) -> None:
    """Also where the samples of the last step are what is too much."""
    config = tiny_run(f"schedule.steps={steps}")
    (config.parent / "shards/00001.tar").unlink()
    done = pretrain(config)
    assert done.returncode == 3, done.stderr
    assert "shards/00001.tar: " in done.stderr and "x shard_missing" in done.stderr and "Traceback" not in done.stderr
    events = lines(config.parent / "run/events.jsonl")
    assert {event["shard"] for event in events if event["kind"] == "bad_sample"} == {"00001.tar"}
    ends = {event["rank"]: event["message"] for event in events if event["kind"] == "failed"}
    assert set(ends) == {0, 1} and len(set(ends.values())) == 1  # judged together, from the counts of both
    assert all(event["error"] == "BadDataError" for event in events if event["kind"] == "failed")


@pytest.mark.slow
def test_a_shard_of_no_images_ends_every_rank_with_3_and_is_named(tiny_run: Callable[..., Path]) -> None:
    """A set that somebody else made, found out by indexing it."""
    import io
    import tarfile

    config = tiny_run()
    for path in (config.parent / "shards").iterdir():
        if path.suffix != ".tar":
            path.unlink()
    with tarfile.open(config.parent / "shards/00001.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(12):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = 4
            archive.addfile(info, io.BytesIO(b"text"))
    done = pretrain(config)
    assert done.returncode == 3, done.stderr
    assert "00001.tar: 12 x not_an_image" in done.stderr
    told = [event for event in lines(config.parent / "run/events.jsonl") if event["kind"] == "damaged_shard"]
    assert ("00001.tar", "not_an_image", 12) in {(event["shard"], event["reason"], event["samples"]) for event in told}
