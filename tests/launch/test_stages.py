"""Chains and sweeps: the commands that they stand for, and the jobs that they become."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from launch import stages
from launch.cli import run

TASKS = {
    "h427m.yaml": "pretraining",
    "more.yaml": "pretraining",
    "in22k.yaml": "classification",
    "in1k": "classification",
}


def test_a_chain_hands_each_run_to_the_next() -> None:
    parts = ["h427m.yaml", "in22k.yaml", "in1k", "evaluate:shards/val"]
    assert stages.chain(parts, ["training.seed=3"], None, TASKS.__getitem__) == [
        ["pretrain", "h427m.yaml", "training.seed=3", "--output", "runs/h427m"],
        ["finetune", "in22k.yaml", "training.seed=3", "--from", "runs/h427m", "--output", "runs/in22k"],
        ["finetune", "in1k", "training.seed=3", "--from", "runs/in22k", "--output", "runs/in1k"],
        ["evaluate", "runs/in1k", "--data", "shards/val"],
    ]
    again = stages.chain(["h427m.yaml", "more.yaml"], [], Path("/big"), TASKS.__getitem__)
    assert again[1] == ["pretrain", "more.yaml", "initialize_from=/big/h427m", "--output", "/big/more"]
    for wrong in (["h427m.yaml"], ["evaluate:x", "h427m.yaml"]):
        with pytest.raises(UserError, match="--chain"):
            stages.chain(wrong, [], None, TASKS.__getitem__)


def test_a_sweep_is_every_combination_each_in_its_folder() -> None:
    command = ["pretrain", "c.yaml", "--output", "runs/c", "data.workers=2"]
    found = stages.sweep(command, ["optimizer.lr=1e-4,3e-4", "training.seed=0,1"])
    assert len(found) == 4
    assert found[1] == [
        *("pretrain", "c.yaml", "data.workers=2", "optimizer.lr=1e-4", "training.seed=1"),
        *("--output", "runs/c-lr=1e-4-seed=1"),
    ]
    for wrong in ("optimizer.lr", "optimizer.lr=", "=1", "optimizer.lr=1,,2"):
        with pytest.raises(UserError, match="--sweep"):
            stages.sweep(command, [wrong])
    with pytest.raises(UserError, match="goes with a training"):
        stages.sweep(["python", "x.py"], ["a=1"])


def test_jobs_of_a_chain_wait_for_the_one_before(
    tiny_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_program: Callable[[str, str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = tiny_run()
    second = first.with_name("second.yaml")
    second.write_text(first.read_text())
    monkeypatch.chdir(tmp_path)
    fake_program("sbatch", f"echo x >> {tmp_path}/n; echo $((40 + $(wc -l < {tmp_path}/n)))")
    words = ["--chain", f"{first},{second},evaluate:val", "--output", "big", "--max-restarts", "1"]
    assert run(["launch", "slurm", *words]) == 0
    assert "submitted job 41" in capsys.readouterr().out
    scripts = [(tmp_path / "big" / path.stem / "slurm.sh").read_text() for path in (first, second)]
    assert "--dependency" not in scripts[0] and "#SBATCH --dependency=afterok:41\n" in scripts[1]
    last = (tmp_path / "slurm.sh").read_text()
    assert "afterok:42" in last and f"evaluate {tmp_path.name}" not in last and "evaluate big/second" in last
    assert json.loads((tmp_path / "big" / "second" / "job.json").read_text())["number"] == "42"


def test_a_chain_of_arrays_is_refused(
    tiny_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage that needs two jobs of its array has one that ends with 75, for which nothing behind it would start."""
    chain = ["--chain", f"{tiny_run()},evaluate:val", "--output", str(tmp_path / "big"), "--dry-run"]
    assert run(["launch", "slurm", *chain]) == 0
    assert "#SBATCH --requeue\n" in capsys.readouterr().out, "what stands in its place"
    assert run(["launch", "slurm", "--array", "2", *chain]) == 2
    assert "leave --array out" in capsys.readouterr().err


def test_a_mistake_in_a_later_stage_queues_nothing(
    tiny_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_program: Callable[[str, str], None],
) -> None:
    config = str(tiny_run())
    monkeypatch.chdir(tmp_path)
    fake_program("sbatch", f"touch {tmp_path}/submitted; echo 1")
    assert run(["launch", "slurm", "--sweep", "optimizer.lr=1e-3,many", "pretrain", config]) == 2
    assert not (tmp_path / "submitted").exists()
