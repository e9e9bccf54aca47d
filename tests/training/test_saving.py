"""A save's threads on three ranks of one process, which talk as the ranks of a group do."""

import builtins
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.training.checkpoint import saving
from pretrain.training.checkpoint.saving import Save

RANKS = 3


class Group:
    """What DistributedContext gives a save, over a dictionary."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: dict[str, str] = {}
        self.committed: list[dict[str, Any]] = []
        monkeypatch.setattr(saving, "_numbers", iter([7] * RANKS))

    def heard(self, keys: list[str]) -> list[str] | None:
        return [self.said[key] for key in keys] if self.said.keys() >= set(keys) else None

    def start(self, rank: int, folder: Path) -> Save:
        context = SimpleNamespace(
            rank=rank, world_size=RANKS, leader=rank == 0, say=self.said.__setitem__, heard=self.heard
        )
        return Save(folder, [("param/w", torch.arange(4.0))], context, self.committed.append)  # type: ignore[arg-type]


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    return Group(monkeypatch)


def test_the_leader_commits_when_the_last_rank_has_written(group: Group, tmp_path: Path) -> None:
    early = [group.start(rank, tmp_path) for rank in (0, 1)]
    early[1].wait()
    assert not early[0].done and not group.committed
    late = group.start(2, tmp_path)
    for save in (*early, late):
        save.wait()
        assert save.done and save.error is None
    assert [sorted(files) for files in group.committed] == [[f"rank-0000{rank}.safetensors" for rank in range(RANKS)]]
    assert all((tmp_path / name).stat().st_size == one["bytes"] for name, one in group.committed[0].items())


def test_a_shard_that_cannot_be_written_is_never_committed(group: Group, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    saves = [group.start(rank, tmp_path if rank != 1 else tmp_path / "file") for rank in range(RANKS)]
    for save in saves:
        save.wait()
    assert [type(save.error) for save in saves] == [type(None), FileExistsError, type(None)]
    assert not group.committed


@pytest.mark.parametrize(("wrote", "commits"), [((1, 2), 1), ((1,), 0)])
def test_an_abandoned_save_commits_what_is_whole_and_waits_for_none(
    group: Group, tmp_path: Path, wrote: tuple[int, ...], commits: int
) -> None:
    for rank in wrote:
        group.start(rank, tmp_path).wait()
    leader = group.start(0, tmp_path)
    leader.abandon()
    assert leader.done and leader.error is None and len(group.committed) == commits


def test_what_a_save_asks_of_the_file_system_does_not_grow_with_the_ranks(
    group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened, made and renamed: a rank's shard and its folder; the leader's four files and `latest`, at any number."""
    asked: Counter[str] = Counter()
    for module, name in ((builtins, "open"), (os, "open"), (os, "mkdir"), (os, "rename"), (os, "replace")):
        original = getattr(module, name)

        def call(*arguments: Any, name: str = name, original: Any = original, **named: Any) -> Any:
            asked[name] += str(tmp_path) in str(arguments[0])
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, call)
    group.start(1, tmp_path / "checkpoints" / ".writing-step-00000004").wait()
    assert asked["open"] == 1 and asked["mkdir"] <= 3 and not asked["rename"] + asked["replace"], asked
    counts = []
    for step, ranks in ((4, 2), (5, 256)):
        (tmp_path / "checkpoints" / f".writing-step-{step:08d}").mkdir(exist_ok=True)
        asked.clear()
        shards = {saving.shard_name(rank): {"bytes": 1, "sha256": "0" * 64} for rank in range(ranks)}
        saving.commit(tmp_path / "checkpoints", step, shards, dict.fromkeys(saving.TEXTS, "{}"))
        counts.append(dict(asked))
    assert counts[0] == counts[1] and sum(counts[0].values()) <= 30, counts
