"""Stop anywhere, go on with other ranks and workers: nothing is repeated or missed, whatever the batch."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading_sets import write_set
from test_reader import config, read

from data_pipeline.format import packed_rows, read_manifest, read_sidecar

SIZES = [7, 5, 0, 9, 6]
EPOCH = sum(SIZES)
DAMAGED = [("00001.tar", 2), ("00003.tar", 8)]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 samples, the images of two of them overwritten."""
    folder = tmp_path_factory.mktemp("sets") / "damaged"
    manifest = write_set(folder, SIZES)
    entries = {entry.name: entry for entry in manifest.shards}
    for shard, row in DAMAGED:
        place = packed_rows(read_sidecar(manifest.sidecar_path(entries[shard]))).to_pylist()[row]
        with open(folder / shard, "r+b") as file:
            file.seek(place["image_offset"] + 100)
            file.write(b"damage")
    return folder


RANKS = st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([0, 0, 1]))  # world, workers


@settings(max_examples=25)
@given(before=RANKS, after=RANKS, share=st.integers(1, 5), stop=st.integers(0, 6), more=st.integers(1, 6))
def test_every_sample_once_an_epoch_whenever_a_run_stopped(
    damaged: Path, before: tuple[int, int], after: tuple[int, int], share: int, stop: int, more: int
) -> None:
    batch = share * math.lcm(before[0], after[0])
    events: list[dict[str, Any]] = []
    found = []
    for (world, workers), start, steps in ((before, 0, stop), (after, stop, more)):
        chosen = config(damaged, workers=workers, max_bad_rate=1.0, views=1)
        found += read(chosen, steps, batch_size=batch, start=start, world=world, events=events)
    positions = [int(position) for part in found for position in part["positions"]]
    assert positions == list(range(batch * (stop + more)))
    used = [(sample.shard, sample.row) for part in found for sample in part["samples"]]
    keys = [(sample.shard, sample.key) for part in found for sample in part["samples"]]
    # Put back what was replaced: then every epoch is the whole set, each sample once; the last may be cut short.
    # A place has several events where what should have replaced a sample was bad, too.
    told: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["kind"] == "bad_sample":
            told.setdefault(event["position"], event)
    for position, event in told.items():
        assert event["step"] == position // batch and event["reason"] == "image_damaged"
        assert keys[position] == (event["replaced_by"]["shard"], event["replaced_by"]["key"])
        used[position] = (event["shard"], event["row"])
    whole = Counter((entry.name, row) for entry in read_manifest(damaged).shards for row in range(entry.samples))
    for start in range(0, len(used), EPOCH):
        epoch = Counter(used[start : start + EPOCH])
        assert epoch == whole if len(used) >= start + EPOCH else epoch <= whole
    first_tries = Counter(used[position] for position in told)
    assert set(first_tries) <= set(DAMAGED)
    assert sum(first_tries.values()) == sum(one in DAMAGED for one in used)
