"""A fast folder on every node: what was whole there is brought over, also where the shared folder never got it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_fakes import configuration, events, finish, logs, run_ranks, start_ranks, wait_until

from pretrain.training import run
from pretrain.training.checkpoint import saving
from pretrain.training.checkpoint.disk import complete_checkpoints, find_checkpoint, load_weights
from pretrain.training.checkpoint.fast_folder import newest_whole
from pretrain.training.checkpoint.saving import TEXTS


def assert_same(one: Path, other: Path) -> None:
    for which in ("model", "ema"):
        left, right = load_weights(one, which)[0], load_weights(other, which)[0]
        assert all(torch.equal(left[name], right[name]) for name in right)


def test_ranks_killed_while_copying_go_on_from_their_nodes_disks(tmp_path: Path) -> None:
    """Each rank has a folder of its own, as on two nodes. The copy of step 8 never ends."""
    output, nodes = tmp_path / "run", tmp_path / "nodes"
    config = configuration(checkpoint__fast_folder=f"{nodes}/$RANK", schedule__steps=14)
    ranks = start_ranks(config, output, 2, FAKE_SLOW_COPY="step-00000008")
    wait_until(lambda: len(list(nodes.glob("*/*/step-00000008/rank-*.json"))) == 2, ranks)
    for rank in ranks:
        rank.kill()
    finish(ranks)
    assert [checkpoint.step for checkpoint in complete_checkpoints(output)] == [4]
    whole = tmp_path / "whole"
    work = [(output, config), (whole, configuration(schedule__steps=14))]
    assert run_ranks(work, tmp_path / "again", 2) == [0, 0], logs(tmp_path / "again")[-3000:]
    assert [e["step"] for e in events(output, "resume")] == [8]
    assert [e["step"] for e in events(output, "checkpoint") if e.get("source")] == [8]
    assert_same(output, whole)
    assert not list(nodes.glob("*/*/step-*")), "nothing is left where the run's folder has it"
    find_checkpoint(output, "8").verify()


def test_a_full_fast_folder_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = saving.write_rank_file

    def full(path: Path, entries: Any) -> dict[str, Any]:
        if path.is_relative_to(tmp_path / "fast"):
            raise OSError(28, "No space left on device")
        return write(path, entries)

    monkeypatch.setattr(saving, "write_rank_file", full)
    assert run(configuration(checkpoint__fast_folder=str(tmp_path / "fast")), tmp_path / "run") == 0
    assert [e["step"] for e in events(tmp_path / "run", "fast_folder_failed")] == [4, 8, 12]
    find_checkpoint(tmp_path / "run", "12").verify()


def test_a_save_that_lacks_a_part_is_not_brought_over() -> None:
    texts: dict[str, dict[str, Any]] = {name: {} for name in TEXTS}
    shards = {f"rank-0000{rank}.safetensors": {"bytes": 1, "sha256": "", "ranks": 2} for rank in range(2)}
    first, second = ({name: shards[name]} for name in shards)
    nodes = [{8: texts | first, 4: texts | first}, {8: second, 4: second}]
    found = newest_whole(nodes, 4)
    assert found is not None and found.step == 8
    assert found.sources == dict.fromkeys([*TEXTS, "rank-00000.safetensors"], 0) | {"rank-00001.safetensors": 1}
    assert newest_whole(nodes, 8) is None, "the run has it"
    assert newest_whole([nodes[0], {4: second}], 3).step == 4  # type: ignore[union-attr]
    assert newest_whole([{8: first}, {8: second}], 4) is None, "the leader's node has lost its disk"
