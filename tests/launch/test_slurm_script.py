"""The sbatch script: its text, and the command that makes it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from launch.cli import run
from launch.slurm import Container, SlurmJob, script, submit

GOLDEN = Path(__file__).parent / "golden"

PLAIN = SlurmJob(
    command=("internimage", "pretrain", "internimage_h_m3i_427m", "--output", "runs/h with space"),
    name="h",
    nodes=16,
    ranks_per_node=8,
    gpus_per_node="h100:8",
    cpus_per_rank=12,
    time="1-00:00:00",
    partition="gpu",
    account="vision",
    logs="/runs/h/logs",
    run="/runs/h",
    directory="/project",
    script="/runs/h/slurm.sh",
    setup=("module load cuda/13",),
    extra=("--exclusive",),
)
CHAIN = SlurmJob(
    command=("internimage", "pretrain", "tiny"),
    ranks_per_node=1,
    array=5,
    signal_seconds=90,
    container=Container("/images/house.sqsh", "/data:/data"),
)


@pytest.mark.parametrize(("job", "name"), [(PLAIN, "slurm_requeue.sh"), (CHAIN, "slurm_array_container.sh")])
def test_the_script_is_the_golden_text(job: SlurmJob, name: str) -> None:
    assert script(job) == (GOLDEN / name).read_text()


@pytest.mark.parametrize("job", [PLAIN, CHAIN])
def test_bash_accepts_the_script(job: SlurmJob) -> None:
    checked = subprocess.run(["bash", "-n"], input=script(job), text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_apptainer_runs_the_command_inside_its_image() -> None:
    job = SlurmJob(
        command=("internimage", "doctor"), gpus_per_node="8", container=Container("a.sif", None, "apptainer")
    )
    assert "apptainer exec --nv a.sif internimage doctor" in script(job)


@pytest.mark.parametrize("time", ["tomorrow", "1-", "10:00:00:00"])
def test_a_time_that_slurm_would_refuse_is_refused(time: str) -> None:
    with pytest.raises(UserError, match="--time"):
        SlurmJob(command=("x",), time=time)


def test_submitting_without_sbatch_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="login node"):
        submit(SlurmJob(command=("x",)))


def test_dry_run_shows_the_script_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = run(
        ["launch", "slurm", "--nodes", "2", "--gpus-per-node", "a100:4", "--dry-run", "python", "x.py", "--debug"]
    )
    text = capfd.readouterr().out
    assert code == 0
    assert "#SBATCH --ntasks-per-node=4" in text
    assert "python x.py --debug" in text
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_of_sbatch_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_program: Callable[[str, str], None]
) -> None:
    fake_program("sbatch", "echo 'invalid partition' >&2; exit 1")
    with pytest.raises(UserError, match="invalid partition"):
        submit(SlurmJob(command=("x",), logs=str(tmp_path), script=str(tmp_path / "slurm.sh")))
