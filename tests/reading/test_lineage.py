"""From a training step back to shards, URLs and captions, and to pictures of what training saw."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reading_sets import tokenize, write_set

from data_pipeline.errors import UserError
from data_pipeline.format import read_manifest, read_sidecar
from data_pipeline.reading import DataConfig, ImageText, Reader
from data_pipeline.reading.advice import recommend_workers
from data_pipeline.reading.order.course import Segment
from pretrain.analysis.batch import inspect_batch
from pretrain.configuration import RunConfig, dump_config, load_config, parse_config
from pretrain.training.segments import segments_of, write_segments

DATA = {"image_size": 32, "context_length": 8, "workers": 0, "block_shards": 2}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", [5, 7, 6], classes=["a", "b"])
    data = DATA | {"sources": [{"path": str(tmp_path / "set")}]}
    config = parse_config({"data": data, "schedule": {"steps": 9}, "training": {"batch_size": 10, "seed": 3}})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    event = {
        "kind": "bad_sample",
        "step": 2,
        "position": 23,
        "reason": "image_damaged",
        "replaced_by": {"shard": "x", "key": "y"},
    }
    (folder / "events.jsonl").write_text(
        json.dumps(event) + "\n" + json.dumps(event | {"step": 1, "position": 11}) + '\n{"kind": "cut'
    )
    return folder


def test_records_lead_back_to_urls_and_captions(run, tmp_path):
    config = DataConfig(sources=[{"path": str(tmp_path / "set")}], **DATA)
    with Reader(config, ImageText(tokenize, 8), batch_size=10, seed=3) as reader:
        batches = reader.batches(1)
        for step in (1, 2, 3):
            batch, records = next(batches), reader.records(step)
            for row, record in enumerate(records):
                assert (record["source"], record["shard"], record["key"], record["row"]) == tuple(batch.samples[row])
                assert record["position"] == step * 10 + row and record["epoch"] == (step * 10 + row) // 18
                assert record["caption"] == batch.targets.captions[row]
                assert record["url"] == "https://pictures.invalid/" + record["caption"].split()[1]
                assert record["label"] == "ab"[int(batch.targets.labels[row])]


def test_rows_at_any_positions_are_those_of_training(run, tmp_path):
    config = DataConfig(sources=[{"path": str(tmp_path / "set")}], **DATA)
    with Reader(config, ImageText(tokenize, 8), batch_size=10, seed=3) as reader:
        batch = next(reader.batches(4))
        again = reader.at(np.array([47, 42]))
    assert torch.equal(again.views, batch.views[[7, 2]]) and torch.equal(again.crops, batch.crops[[7, 2]])


def test_inspecting_a_step_lists_and_draws_its_batch(run):
    found = inspect_batch(run, 2)
    assert [sample["position"] for sample in found["samples"]] == list(range(20, 30))
    bad = [sample for sample in found["samples"] if "bad" in sample]
    assert [sample["position"] for sample in bad] == [23] and bad[0]["bad"] == "image_damaged"
    with Image.open(found["pictures"]) as sheet:
        assert sheet.size == (4 * (2 * 32 + 4), 3 * (32 + 26 + 4))
        first = np.asarray(sheet)[:32, :32]
    config = load_config(str(run / "config.yaml")).data  # with the views of the run's preset
    with Reader(config, ImageText(), batch_size=10, seed=3) as reader:
        assert np.array_equal(first, next(reader.batches(2)).views[0, 0].numpy())


def test_every_step_is_told_of_a_run_whose_weights_and_batch_changed(tmp_path: Path) -> None:
    """Steps 0 to 3 as configured first, from step 4 on with other weights and another batch, read in workers."""
    write_set(tmp_path / "one", [5, 7], classes=["a", "b"])
    write_set(tmp_path / "two", [4, 6, 3], classes=["a", "b"])
    folder = tmp_path / "run"
    folder.mkdir()

    def config(weights: tuple[float, float], batch_size: int) -> RunConfig:
        names = zip(("one", "two"), weights, strict=True)
        sources = [{"path": str(tmp_path / name), "weight": weight} for name, weight in names]
        training = {"batch_size": batch_size, "seed": 3}
        return parse_config(
            {"data": DATA | {"workers": 1, "sources": sources}, "schedule": {"steps": 9}, "training": training}
        )

    segments: tuple[Segment, ...] = ()
    seen, records = {}, {}
    for now, steps in ((config((3, 1), 6), range(4)), (config((1, 2), 10), range(4, 9))):
        segments = segments_of(now, segments, steps[0])
        with Reader(now.data, ImageText(), batch_size=now.training.batch_size, seed=3) as reader:
            for step, batch in zip(steps, reader.batches(steps[0], segments), strict=False):
                seen[step] = [(*ref, int(p)) for ref, p in zip(batch.samples, batch.positions, strict=True)]
    write_segments(folder, segments)
    (folder / "config.yaml").write_text(dump_config(now))
    for step in range(9):
        records[step] = inspect_batch(folder, step)["samples"]
    columns = ("source", "shard", "key", "row", "position")
    assert {step: [tuple(row[c] for c in columns) for row in rows] for step, rows in records.items()} == seen
    assert [p for rows in seen.values() for *_, p in rows] == list(range(4 * 6 + 5 * 10))
    two = [(row[1], row[2]) for rows in seen.values() for row in rows if row[0] == "two"]
    assert len(set(two[:13])) == 13, "each sample of a source once an epoch, across the change"


def test_a_replacement_that_lacks_something_is_still_a_replacement(run):
    """The sample at a place was bad, and so was the first one tried for it; the second is used without its text."""
    kept = read_manifest(run.parent / "set")
    shard = kept.shards[0].name
    key = read_sidecar(kept.sidecar_path(kept.shards[0]))["key"].to_pylist()[3]
    base = {"step": 2, "position": 25, "source": "set"}
    told = [
        base | {"kind": "bad_sample", "reason": reason, "replaced_by": {"shard": shard, "key": key}}
        for reason in ("image_damaged", "shard_cut")
    ]
    told.append(base | {"kind": "incomplete_sample", "reason": "text_missing"})
    with open(run / "events.jsonl", "a") as file:
        file.write("\n" + "".join(json.dumps(event) + "\n" for event in told * 2))  # again, after a resume
    sample = inspect_batch(run, 2)["samples"][5]
    assert (sample["bad"], sample["incomplete"]) == ("image_damaged, shard_cut", "text_missing")
    used = sample["replaced_by"]
    assert (used["shard"], used["key"], used["row"]) == (shard, key, 3)
    assert used["caption"] == "picture 3" and used["url"] == "https://pictures.invalid/3" and used["label"] == "b"


def test_advice_about_streams_says_why_there_is_none(tmp_path):
    config = DataConfig(sources=[{"path": "pipe:cat x.tar", "samples": 9}], **DATA)
    with pytest.raises(UserError, match=r"read in the training process.*data_wait_ms"):
        recommend_workers(config, ImageText(tokenize, 8))


def test_advice_about_a_set_that_cannot_be_written_indexes_it_elsewhere(tmp_path):
    """As training does. A file in the place of the lock refuses whoever would write beside the shards."""
    write_set(tmp_path / "foreign", [4, 4])
    for path in (tmp_path / "foreign").iterdir():
        if path.suffix != ".tar":
            path.unlink()
    (tmp_path / "foreign/.index.lock").mkdir()
    before = sorted((tmp_path / "foreign").iterdir())
    config = DataConfig(sources=[{"path": str(tmp_path / "foreign")}], **DATA)
    assert recommend_workers(config, ImageText(tokenize, 8), seconds=0.01)["samples_per_second_of_one_core"] > 0
    assert sorted((tmp_path / "foreign").iterdir()) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        inspect_batch(tmp_path, 0)


def test_advice_measures_this_machine_and_asks_for_enough_workers(run, tmp_path):
    config = DataConfig(sources=[{"path": str(tmp_path / "set")}], **DATA)
    found = recommend_workers(config, ImageText(tokenize, 8), samples_per_second=1e-3, seconds=0.05)
    rate = found["samples_per_second_of_one_core"]
    assert rate > 10 and found["milliseconds_per_sample"] == pytest.approx(1000 / rate, rel=0.01)
    assert found["workers_needed"] == 1 and found["enough"] and found["share_of_time_with_workers_0"] < 0.001
    greedy = recommend_workers(config, ImageText(tokenize, 8), samples_per_second=1e6, processes=10**6, seconds=0.05)
    assert greedy["workers_needed"] >= 1.2e6 / greedy["samples_per_second_of_one_core"]
    assert greedy["workers"] == 0 and not greedy["enough"]
