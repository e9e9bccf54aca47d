"""`launch slurm shards ... --tasks N`: eight tasks on two nodes, one killed while it holds a unit, one node lost."""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from curation_sets import encoded, files, photo

from data_pipeline.errors import UserError
from data_pipeline.preparation import pack
from launch.cli import run
from launch.slurm import hand_over
from launch.task_array import TaskArray, array_script, shared_command

ROOT = Path(__file__).resolve().parents[2]


def _cluster() -> ModuleType:
    path = ROOT / "tests/launch/slurm_cluster.py"
    spec = importlib.util.spec_from_file_location("slurm_cluster_for_shards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


slurm_cluster = _cluster()
REASON = slurm_cluster.why_not()


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with slurm_cluster.Cluster(tmp_path_factory.mktemp("cluster"), 27817) as running:
        yield running


def test_every_task_runs_the_same_command_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "slurm", "--tasks", "8", "--time", "1:00:00", "--dry-run", "shards", "pack", "in", "out"]
    assert run(words) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=1-8\n" in text and "--signal=USR1@" in text and "#SBATCH --requeue" in text
    assert "shards pack in out --parts 64" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_tasks_wait_for_jobs_in_folders_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a b%j").mkdir()
    monkeypatch.chdir(tmp_path / "a b%j")
    assert run(["launch", "slurm", "--tasks", "2", "--after", "123", "--dry-run", "shards", "fetch", "a", "b"]) == 0
    text = capsys.readouterr().out
    assert f'#SBATCH --chdir="{tmp_path}/a b%j"\n' in text
    assert f'#SBATCH --output="{tmp_path}/a b%%j/shards-%A_%a.out"\n' in text
    assert "#SBATCH --dependency=afterok:123\n" in text and "#SBATCH --kill-on-invalid-dep=yes\n" in text
    assert "\nexport SRUN_CPUS_PER_TASK=" in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--container", "img.sqsh", "--gpus-per-node", "2"], "--gpus-per-node, --container"),
        (["--max-restarts", "3"], "--max-restarts"),
        (["--array", "2", "--no-gate"], "--gate, --array"),
        (["--time", "00:04:00"], "--signal-seconds"),
        (["--time", "soon"], "--time"),
    ],
)
def test_what_tasks_cannot_have_is_refused(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["launch", "slurm", "--tasks", "2", *words, "--dry-run", "shards", "fetch", "a", "b"]
    assert run(command) == 2
    assert named in capsys.readouterr().err


def test_work_that_is_not_shared_is_refused() -> None:
    for words in (["pretrain", "demo"], ["shards", "dedup", "x"], ["shards"]):
        with pytest.raises(UserError, match="tasks share"):
            shared_command(words, 4)
    assert shared_command(["internimage", "shards", "fetch", "a", "b", "--parts=5"], 4)[-1] == "--parts=5"
    assert shared_command(["shards", "merge", "a", "b", "c"], 4)[-3:] == ("a", "b", "c")


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=f"no Slurm here: {REASON}")
def test_eight_tasks_make_the_bytes_of_one(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for n in range(64):
        (images / f"{n:02d}.jpg").write_bytes(encoded(photo(n)))
    pack(images, tmp_path / "whole/set", rows_per_shard=1, workers=1)
    for name, value in (cluster.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "shared/set"
    command = ["shards", "pack", str(images), str(output), "--rows-per-shard", "1", "--workers", "1", "--parts", "32"]
    array = TaskArray(shared_command(command, 8), 8, logs=str(tmp_path), directory=str(tmp_path), time="0:10:00")
    number = hand_over(array_script(array), tmp_path / "array.sh", tmp_path)

    def running() -> list[str]:
        return cluster.ask("squeue", "-h", "-j", number, "-t", "R", "-o", "%i").stdout.split()

    deadline = time.monotonic() + 240
    while not list(output.glob(".parts/*/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed = running()[0]
    cluster.ask("scancel", "--signal=KILL", killed)  # the task dies while it holds a part
    cluster.daemons[-1].kill()  # the node n2 is lost with what runs there
    cluster.daemons[-1].wait()
    cluster.ask("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    while not (output / "manifest.json").exists() and time.monotonic() < deadline:
        for task in cluster.ask("squeue", "-h", "-j", number, "-t", "PD", "-o", "%i").stdout.split():
            cluster.ask("scontrol", "update", f"JobId={task}", "StartTime=now")  # Slurm holds requeued ones back
        time.sleep(0.5)
    logs = "\n".join(path.read_text(errors="replace")[-500:] for path in sorted(tmp_path.glob("*.out")))
    assert (output / "manifest.json").exists(), logs
    cluster.ask("scancel", number)
    made = {name: data for name, data in files(output).items() if not name.startswith((".parts", ".units"))}
    assert made == files(tmp_path / "whole/set")
    assert sys.executable in (tmp_path / "array.sh").read_text()
