"""Disks that fill or lie, files that vanish, configurations that changed, clocks that jump: each with its message."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from training_fakes import configuration, events, lineage, logs, metrics, run_ranks

from data_pipeline.errors import UserError
from pretrain.training import run
from pretrain.training.checkpoint.disk import (
    DamagedError,
    complete_checkpoints,
    describe_checkpoint,
    find_checkpoint,
    load_weights,
    mark_best,
    sealed,
)


def go(output: Path, **changes: object) -> int:
    """One process: this one."""
    return run(configuration(**changes), output)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    assert go(tmp_path / "run", training__stop_after=8) == 75
    return tmp_path / "run"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("faults") / "unbroken"
    assert go(output) == 0
    return output


def assert_ends_like(output: Path, unbroken: Path) -> None:
    one, other = load_weights(output)[0], load_weights(unbroken)[0]
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert [e["loss"] for e in metrics(output)] == [e["loss"] for e in metrics(unbroken)]


def newest_shard(output: Path) -> Path:
    return output / "checkpoints" / "step-00000008" / "rank-00000.safetensors"


def test_a_flipped_bit_is_refused_and_the_checkpoint_before_it_taken(finished: Path, unbroken: Path) -> None:
    shard = newest_shard(finished)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedError, match=r"rank-00000.safetensors does not have the digest"):
        load_weights(finished)
    assert go(finished) == 0
    refused = events(finished, "checkpoint_refused")
    assert refused[0]["step"] == 8 and "digest" in refused[0]["message"]
    assert events(finished, "resume")[-1]["step"] == 4
    assert list((finished / "checkpoints").glob("damaged-step-00000008-*"))
    assert_ends_like(finished, unbroken)


def test_a_missing_file_is_refused_and_the_checkpoint_before_it_taken(finished: Path, unbroken: Path) -> None:
    newest_shard(finished).unlink()
    assert go(finished) == 0
    assert "rank-00000.safetensors is missing" in events(finished, "checkpoint_refused")[0]["message"]
    assert_ends_like(finished, unbroken)


def test_a_cut_manifest_is_refused(finished: Path, unbroken: Path) -> None:
    manifest = newest_shard(finished).with_name("manifest.json")
    manifest.write_text(manifest.read_text()[:40])
    assert go(finished) == 0
    assert "manifest.json cannot be read" in events(finished, "checkpoint_refused")[0]["message"]
    assert_ends_like(finished, unbroken)


def test_a_checkpoint_that_lost_its_manifest_is_refused_and_the_one_before_it_taken(
    finished: Path, unbroken: Path
) -> None:
    newest_shard(finished).with_name("manifest.json").unlink()
    with pytest.raises(DamagedError, match=r"step-00000008: manifest.json is missing"):
        load_weights(finished)
    assert go(finished) == 0
    refused = events(finished, "checkpoint_refused")
    assert [e["step"] for e in refused] == [8] and "manifest.json" in refused[0]["message"]
    assert_ends_like(finished, unbroken)


def test_where_the_only_checkpoint_lost_its_manifest_nothing_starts_afresh_over_it(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert go(output, training__stop_after=4) == 75
    (output / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    rows = (output / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"none of the checkpoints .* is intact(.|\n)*manifest.json"):
        go(output)
    assert rows and (output / "metrics.jsonl").read_bytes() == rows
    assert "none of the checkpoints" in events(output, "failed")[-1]["message"]


@pytest.mark.parametrize("word", [b"files", b"schema", b"bytes", b"sha256", b"rank-00000", b"digest"])
def test_a_manifest_that_still_parses_but_is_not_what_was_written_is_refused(
    finished: Path, unbroken: Path, word: bytes
) -> None:
    manifest = newest_shard(finished).with_name("manifest.json")
    content = bytearray(manifest.read_bytes())
    content[content.index(word)] ^= 2
    json.loads(content)
    manifest.write_bytes(content)
    assert go(finished) == 0
    if word != b"digest":  # whose name alone is damaged: the rest is as it was
        assert [e["step"] for e in events(finished, "checkpoint_refused")] == [8]
    assert_ends_like(finished, unbroken)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"schema": 1}, r"internimage-pretrain 0\.1\.0; this is 0\.2\.0"),
        ({"schema": 99, "version": "9.9"}, r"internimage-pretrain 9\.9; this is 0\.2\.0"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused_by_both_names(
    finished: Path, theirs: dict[str, object], message: str
) -> None:
    manifest = newest_shard(finished).with_name("manifest.json")
    content = json.loads(manifest.read_text())
    del content["digest"], content["version"]
    manifest.write_text(sealed(content | theirs))
    (finished / "config.yaml").write_text("objective: {preset: m3i}\n")  # as 0.1.0 wrote it
    with pytest.raises(UserError, match=message) as error:
        go(finished)
    assert not isinstance(error.value, DamagedError)
    with pytest.raises(UserError, match=message):
        load_weights(finished)


def test_where_no_checkpoint_is_intact_nothing_starts_afresh_over_them(finished: Path) -> None:
    for shard in (finished / "checkpoints").glob("step-*/rank-*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"none of the checkpoints .* is intact(.|\n)*bytes, its manifest says"):
        go(finished)
    metrics = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"set aside as damaged-\*, and none is left"):
        go(finished)  # the same command once more
    assert metrics and (finished / "metrics.jsonl").read_bytes() == metrics


def test_leftovers_of_a_crash_are_never_taken_for_a_checkpoint(finished: Path, unbroken: Path) -> None:
    folder = finished / "checkpoints"
    shutil.copytree(folder / "step-00000008", folder / ".writing-step-00000010")
    shutil.copytree(folder / "step-00000008", folder / "step-00000099")
    (folder / "step-00000099" / "manifest.json").unlink()
    shutil.copytree(folder / "step-00000004", folder / ".deleting-step-00000002")
    assert [c.step for c in complete_checkpoints(finished)] == [8, 4]
    assert go(finished) == 0
    assert not list(folder.glob(".writing-*")) and not list(folder.glob(".deleting-*"))
    assert [e["step"] for e in events(finished, "checkpoint_refused")] == [99]
    assert_ends_like(finished, unbroken)


def test_another_configuration_is_refused_by_key(finished: Path) -> None:
    with pytest.raises(UserError, match=r"optimizer.lr: 0.01 there, 0.02 now"):
        go(finished, optimizer__lr=2e-2)
    with pytest.raises(UserError, match=r"training.batch_size"):
        go(finished, training__batch_size=8)


def test_a_wanted_change_is_taken_recorded_and_needs_its_name_once(finished: Path) -> None:
    with pytest.raises(UserError, match=r"--allow-change optimizer\.lr"):
        go(finished, optimizer__lr=2e-3)
    changed = {"optimizer__lr": 2e-3, "schedule__steps": 14}
    with pytest.raises(UserError, match=r"schedule.steps: 12 there, 14 now"):
        go(finished, training__allow_changes=["optimizer.lr"], **changed)
    assert go(finished, training__allow_changes=["optimizer.lr", "schedule"], training__stop_after=10, **changed) == 75
    expected = {"optimizer.lr": [0.01, 0.002], "schedule.steps": [12, 14]}
    assert [(e["step"], e["changes"]) for e in events(finished, "config_changed")] == [(8, expected)]
    history = [json.loads(line) for line in (finished / "config-history.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["changes"]) for entry in history] == [(8, expected)]
    assert go(finished, **changed) == 0, "the run is now of this configuration"
    assert metrics(finished)[-1]["step"] == 14 and metrics(finished)[8]["lr"] < 0.002


def test_the_batch_grows_within_a_run_and_no_sample_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 samples a step, 32 from step 4 on, 8 from step 8 on; killed and resumed in each part."""
    output, trace = tmp_path / "run", tmp_path / "lineage"
    monkeypatch.setenv("FAKE_LINEAGE", str(trace))
    grown = {"training__batch_size": 32, "training__accumulation": 2, "training__precision": "fp32"}
    allowed = {"training__allow_changes": ["training.batch_size", "training.accumulation"]}
    assert go(output, training__stop_after=4) == 75
    with pytest.raises(UserError, match=r"--allow-change training\.accumulation --allow-change training\.batch_size"):
        go(output, **grown)
    assert go(output, **grown, **allowed, training__stop_after=6) == 75
    assert go(output, **grown, training__stop_after=8) == 75
    assert go(output, training__batch_size=8, **allowed) == 0
    rows: dict[int, list[int]] = {}
    for _, step, _, positions in lineage(trace):
        rows.setdefault(step, []).extend(positions)
    assert [len(rows[step]) for step in range(12)] == [16] * 4 + [32] * 4 + [8] * 4
    assert [p for step in range(12) for p in rows[step]] == list(range(4 * 16 + 4 * 32 + 4 * 8))
    segments = json.loads((output / "segments.json").read_text())
    assert [(s["step"], s["batch_size"]) for s in segments] == [(0, 16), (4, 32), (8, 8)]
    assert find_checkpoint(output).samples == 224
    with pytest.raises(UserError, match=r"give schedule\.steps"):
        epochs = {"schedule__steps": None, "schedule__epochs": 3.0}
        go(output, **epochs, training__allow_changes=["schedule", "training.batch_size"])


@pytest.mark.parametrize("key", ["data.sources", "data.sources.0.path", "model.name", "training.ema.enabled"])
def test_what_would_change_the_samples_or_the_model_cannot_be_allowed(finished: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"--allow-change {key}: a run may change optimizer"):
        go(finished, training__allow_changes=[key])


def test_another_model_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WIDTH", "17")
    with pytest.raises(UserError, match=r"has shape \[33, 24\], this model \[17, 24\]"):
        run(configuration(), finished)


def test_other_data_are_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training_fakes.FakeReader.epoch_samples", 161)
    with pytest.raises(UserError, match=r"160 samples an epoch; data\.sources now hold 161"):
        go(finished)


def test_a_full_disk_ends_in_4_with_a_word_and_loses_nothing(tmp_path: Path, unbroken: Path) -> None:
    output = tmp_path / "run"
    assert go(output, training__stop_after=4) == 75
    limit = newest_shard(output).with_name("rank-00000.safetensors")
    size = (output / "checkpoints" / "step-00000004" / limit.name).stat().st_size
    often = configuration(checkpoint__every_steps=1)
    assert run_ranks(often, output, 1, FAKE_FILE_LIMIT=str(size - 100)) == [4], logs(output)[-2000:]
    failures = events(output, "checkpoint_failed")
    assert len(failures) == 3 and "File too large" in failures[0]["message"]
    assert "3 checkpoints in a row could not be written" in logs(output)
    assert [c.step for c in complete_checkpoints(output)] == [4]
    assert not list((output / "checkpoints").glob(".writing-*"))
    assert go(output) == 0
    assert_ends_like(output, unbroken)


def test_a_read_only_output_is_a_user_error(tmp_path: Path) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)], capture_output=True)
    if mounted.returncode == 0:
        place = folder / "run"
    else:  # without the right to mount: a folder that nobody can write to, root included
        place = Path("/proc/internimage-run")
    try:
        with pytest.raises(UserError, match=r"cannot write the run folder .* name a writable --output"):
            go(place)
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_that_fills_is_survived_once_there_is_room(tmp_path: Path, unbroken: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no right to mount a tmpfs here; the file-size limit above tests the same path")
    try:
        output, ballast = folder / "run", folder / "ballast"
        assert go(output, training__stop_after=4) == 75
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        ballast.write_bytes(b"\0" * max(0, free - 40_000))
        with pytest.raises(UserError, match="No space left on device"):
            go(output, checkpoint__every_steps=1)
        ballast.unlink()
        assert go(output) == 0
        assert_ends_like(output, unbroken)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_rotation_keeps_the_newest_the_best_and_the_milestones(tmp_path: Path) -> None:
    output = tmp_path / "run"
    every = {"checkpoint__every_steps": 1, "checkpoint__keep": 2, "checkpoint__keep_every": 5}
    assert go(output, training__stop_after=3, **every) == 75
    mark_best(output, 2)
    assert go(output, **every) == 0
    assert [c.step for c in complete_checkpoints(output)] == [12, 11, 10, 5, 2]
    assert (output / "checkpoints" / "latest").read_text() == "step-00000012"
    assert describe_checkpoint(output)["step"] == 12
    with pytest.raises(UserError, match="not a complete checkpoint"):
        mark_best(output, 3)


def test_a_jumping_clock_moves_no_checkpoint_and_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, jump = time.time, 0.0

    def jumping() -> float:
        nonlocal jump
        jump += 86_400.0  # a day at every look
        return real() + jump

    monkeypatch.setattr(time, "time", jumping)
    settings = {"checkpoint__every_steps": None, "checkpoint__every_minutes": 1.0}
    assert go(tmp_path / "run", training__policy={"hang_seconds": 300.0}, **settings) == 0
    assert [c.step for c in complete_checkpoints(tmp_path / "run")] == [12]
    assert not events(tmp_path / "run", "hang")


def test_the_minutes_between_checkpoints_are_counted_by_a_clock_that_can_be_given(tmp_path: Path) -> None:
    from pretrain.training.checkpoint import checkpointer

    class Steps:
        now = 0.0

    made = []
    original = checkpointer.Checkpointer.__init__

    def with_clock(self, *arguments, **named) -> None:  # type: ignore[no-untyped-def]
        original(self, *arguments, clock=lambda: Steps.now, **named)
        made.append(self)

    def tick(self, step: int) -> bool:  # type: ignore[no-untyped-def]
        Steps.now += 25.0
        return due(self, step)

    due = checkpointer.Checkpointer.due
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointer.Checkpointer, "__init__", with_clock)
        patch.setattr(checkpointer.Checkpointer, "due", tick)
        go(tmp_path / "run", checkpoint__every_steps=None, checkpoint__every_minutes=1.0, checkpoint__keep=9)
    assert [c.step for c in complete_checkpoints(tmp_path / "run")] == [12, 9, 6, 3]


def test_initialize_from_takes_the_average_of_another_run(unbroken: Path, tmp_path: Path) -> None:
    # In bf16: the masters take the weights as they are, not rounded.
    config = configuration(
        initialize_from=str(unbroken),
        schedule__steps=1,
        schedule__warmup_steps=0,
        optimizer__lr=0.0,
        training__precision="bf16",
    )
    assert run(config, tmp_path / "new") == 0
    average, start = load_weights(unbroken)[0], load_weights(tmp_path / "new", "model")[0]
    trained = [name for name in average if name not in ("frozen", "body.mean")]  # these live in the compute dtype
    assert all(torch.equal(average[name], start[name]) for name in trained)
    # And where two ranks cut the weights as they get them.
    cut = config.model_copy(update={"training": config.training.model_copy(update={"zero_stage": 3})})
    assert run_ranks(cut, tmp_path / "cut", 2) == [0, 0], logs(tmp_path / "cut")[-3000:]
    start = load_weights(tmp_path / "cut", "model")[0]
    assert all(torch.equal(average[name], start[name]) for name in trained)
    with pytest.raises(UserError, match="does not exist"):
        go(tmp_path / "other", initialize_from=str(tmp_path / "nowhere"))


def test_metrics_hold_every_step_once_after_a_cut_line(finished: Path, unbroken: Path) -> None:
    with open(finished / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, "loss": 0}) + "\n" + '{"step": 10, "lo')
    assert go(finished) == 0
    assert [e["step"] for e in metrics(finished)] == list(range(1, 13))
    assert_ends_like(finished, unbroken)


def test_a_start_that_was_refused_binds_no_later_one(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(UserError, match="warm"):
        go(output, schedule__warmup_steps=500)
    assert not (output / "config.yaml").exists() and not (output / "environment.json").exists()
    assert go(output) == 0 and (output / "config.yaml").exists() and (output / "environment.json").exists()
    # The same of a change in the middle of a run: what is refused was never made.
    with pytest.raises(UserError, match="warm"):
        go(output, schedule__warmup_steps=500, training__allow_changes=["schedule"])
    assert go(output) == 0
    assert not (output / "config-history.jsonl").exists() and not events(output, "config_changed")
