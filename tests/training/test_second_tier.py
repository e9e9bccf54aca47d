"""Copies of checkpoints elsewhere: made in the background, fetched where the run's own are gone."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from training_fakes import configuration, events, metrics

from data_pipeline.errors import HANG, UserError
from pretrain.training import run
from pretrain.training.checkpoint.disk import Checkpoint, complete_checkpoints, load_weights
from pretrain.training.checkpoint.identity import run_identity
from pretrain.training.checkpoint.second_tier import SecondTier


def go(output: Path, **changes: object) -> int:
    return run(configuration(**changes), output)


def test_a_purged_run_goes_on_from_its_copy(tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    assert go(tmp_path / "whole") == 0
    output = tmp_path / "run"
    copying = {"checkpoint__copy_to": str(copies)}
    assert go(output, training__stop_after=8, **copying) == 75
    deadline = time.monotonic() + 30
    while not (copies / "step-00000008" / "manifest.json").exists():
        assert time.monotonic() < deadline, "no copy was made"
        time.sleep(0.05)
    (copies / "step-00000009").mkdir()
    (copies / "step-00000009" / "manifest.json").write_text('{"files": {"rank-0')  # a copy that a crash cut
    shutil.rmtree(output / "checkpoints")
    assert go(output, **copying) == 0
    assert [e["step"] for e in events(output, "resume")] == [8]
    assert "step-00000009 cannot be fetched" in events(output, "checkpoint_copy_failed")[0]["message"]
    assert (copies / "step-00000012" / "manifest.json").is_file(), "the end of a run waits for its copy"
    one, other = load_weights(output)[0], load_weights(tmp_path / "whole")[0]
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert [row["loss"] for row in metrics(output)] == [row["loss"] for row in metrics(tmp_path / "whole")]


def test_half_a_copy_is_no_copy(tmp_path: Path) -> None:
    assert go(tmp_path / "run", training__stop_after=4) == 75
    copies = tmp_path / "copies"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000004", copies / "step-00000004")
    (copies / "step-00000004" / "manifest.json").unlink()
    said: list[object] = []
    tier = SecondTier(str(copies), lambda kind, **what: said.append(kind), "me")  # type: ignore[arg-type]
    assert tier.fetch_newest(tmp_path / "other") is None
    tier.offer(complete_checkpoints(tmp_path / "run")[0])
    tier.finish()
    assert said == ["checkpoint_copied"]
    assert tier.fetch_newest(tmp_path / "other") == "step-00000004"
    complete_checkpoints(tmp_path / "other")[0].verify()


def test_a_copy_that_fails_is_an_event_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: SecondTier, checkpoint: object) -> None:
        raise OSError("no room there")

    monkeypatch.setattr(SecondTier, "_copy", full)
    assert go(tmp_path / "run", checkpoint__copy_to=str(tmp_path / "copies")) == 0
    failed = events(tmp_path / "run", "checkpoint_copy_failed")
    assert failed and "no room there" in failed[0]["message"]


def test_the_newest_of_both_is_taken_and_old_copies_go(tmp_path: Path) -> None:
    """In an object store, which has no folders and no renaming. The run's newest one is damaged, its copy is not."""
    import fsspec

    url = f"memory://{tmp_path.name}"
    copying = {"checkpoint__copy_to": url, "checkpoint__keep_copies": 1}
    output = tmp_path / "run"
    assert go(output, training__stop_after=8, **copying) == 75
    files = fsspec.filesystem("memory")
    tier = SecondTier(url, lambda *_, **__: None, run_identity(output), keep=1)  # type: ignore[arg-type]
    tier.offer(complete_checkpoints(output)[0])
    tier.finish()
    assert [path.split("/")[-2] for path in files.glob(f"{url}/step-*/manifest.json")] == ["step-00000008"]
    shard = output / "checkpoints" / "step-00000008" / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert go(output, training__stop_after=9, **copying) == 75
    assert [e["step"] for e in events(output, "resume")] == [8], "from the copy, in place of the damaged one"
    for place in (output / "checkpoints").glob("step-*"):
        if place.name != "step-00000004":
            shutil.rmtree(place)
    assert go(output, **copying) == 0
    assert events(output, "resume")[-1]["step"] in (8, 9), "not from step 4, which the run's folder still had"
    complete_checkpoints(output)[0].verify()


def test_a_rollback_drops_copies_of_the_line_it_left(tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    for step in (4, 8):
        (copies / f"step-{step:08d}").mkdir(parents=True)
        (copies / f"step-{step:08d}" / "manifest.json").write_text("{}")
    SecondTier(str(copies), lambda *_, **__: None, "me").drop_beyond(4)  # type: ignore[arg-type]
    assert [path.name for path in copies.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("there", ["new", "begun", "purged"])
def test_copies_of_another_run_are_not_resumed(tmp_path: Path, there: str) -> None:
    copying = {"checkpoint__copy_to": str(tmp_path / "copies")}
    assert go(tmp_path / "one", **copying) == 0
    other = {"optimizer__lr": 0.02, **copying}
    if there != "new":
        assert go(tmp_path / "other", optimizer__lr=0.02, training__stop_after=4) == 75
    if there == "begun":
        run_identity(tmp_path / "other")
    if there == "purged":
        shutil.rmtree(tmp_path / "other")
    before = sorted((tmp_path / "copies").rglob("*"))
    with pytest.raises(UserError, match=r"copy_to: .* another run.*; give each run a place of its own"):
        go(tmp_path / "other", **other)
    assert sorted((tmp_path / "copies").rglob("*")) == before


def test_two_runs_that_begin_at_once_do_not_share_a_place(tmp_path: Path) -> None:
    assert go(tmp_path / "run", training__stop_after=4) == 75
    said: list[tuple[object, str]] = []
    for name in ("one", "other"):
        tier = SecondTier(str(tmp_path / "copies"), lambda kind, **what: said.append((kind, str(what))), name)  # type: ignore[arg-type]
        tier.offer(complete_checkpoints(tmp_path / "run")[0])
        tier.finish()
    assert [kind for kind, _ in said] == ["checkpoint_copied", "checkpoint_copy_failed"]
    assert "is another run's (one in its run-id)" in said[1][1]


def test_a_slow_last_copy_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = SecondTier._copy

    def slow(self: SecondTier, checkpoint: Checkpoint) -> None:
        time.sleep(8 if checkpoint.step == 12 else 0)
        copy(self, checkpoint)

    left: list[int] = []
    monkeypatch.setattr(SecondTier, "_copy", slow)
    monkeypatch.setattr("os._exit", left.append)
    changes = {"checkpoint__copy_to": str(tmp_path / "copies"), "training__policy": {"hang_seconds": 4.0}}
    assert go(tmp_path / "run", **changes) == 0
    assert HANG not in left and (tmp_path / "copies" / "step-00000012" / "manifest.json").is_file()
