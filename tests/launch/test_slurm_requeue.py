"""When the sbatch script starts a job again: the script itself, run by bash, with programs that play Slurm."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.batch_script import script
from launch.job import SlurmJob
from launch.restarting import Budget
from pretrain.training.logging.record import EventLog
from pretrain.training.loop import _note_requests
from pretrain.training.safeguards.interruption import STOP_FILE, Interruption

FakeProgram = Callable[[str, str], None]


class Job:
    """One Slurm job over its starts. `start` gives the script's exit code; `asked` is what it asked Slurm for."""

    def __init__(self, folder: Path, fake_program: FakeProgram, **settings: object) -> None:
        self.run, self.starts, self._fake = folder / "run", 0, fake_program
        (self.run / "checkpoints").mkdir(parents=True)
        self._asked, self._started = folder / "asked", folder / "started"
        self._text = script(SlurmJob(**(self._defaults(folder) | settings)))  # type: ignore[arg-type]
        for name in ("scontrol", "scancel"):
            fake_program(name, f'[ "$1" = show ] && echo n1 || echo "{name} $*" >> {self._asked}')

    def _defaults(self, folder: Path) -> dict[str, object]:
        budget = Budget(max_restarts=3, pause=0)
        return {"command": ("x",), "logs": str(folder), "run": str(self.run), "restarts": budget}

    @property
    def starts_of_ranks(self) -> int:
        """In the last start of the job."""
        return len(self._started.read_text().splitlines())

    def start(self, code: int, checkpoint: str | None = None, reason: str | None = None) -> int:
        saves = f"echo {checkpoint} > {self.run}/checkpoints/latest" if checkpoint else ":"
        self._fake("srun", f"echo once >> {self._started}; {saves}; exit {code}")
        if reason is not None:
            EventLog(self.run, 0)("stopped", reason=reason)
        place = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_ARRAY_JOB_ID": "5"}
        self._asked.write_text("")
        self._started.write_text("")
        environment = os.environ | place | {"SLURM_RESTART_COUNT": str(self.starts)}
        self.starts += 1
        return subprocess.run(["bash"], input=self._text, text=True, env=environment, timeout=60).returncode

    @property
    def asked(self) -> str:
        return self._asked.read_text().strip()


AGAIN, STOP_CHAIN = "scontrol requeue 7", "scancel --state=PENDING 5"


@pytest.fixture
def job(tmp_path: Path, fake_program: FakeProgram) -> Job:
    return Job(tmp_path, fake_program)


def reason_of_a_stop_file(run: Path) -> str | None:
    (run / STOP_FILE).touch()
    interruption = Interruption()
    interruption.read_stop_file(run)
    return interruption.reason


def reason_of_a_stop_file_beside_a_signal(run: Path) -> str | None:
    (run / STOP_FILE).touch()
    interruption = Interruption()
    interruption.request("SIGUSR1")
    interruption.read_stop_file(run)
    return interruption.reason


def reason_of_stop_after(run: Path) -> str | None:
    """What the training loop itself notes at the step of `training.stop_after`."""
    interruption = Interruption()
    play = SimpleNamespace(
        context=SimpleNamespace(leader=False), settings=SimpleNamespace(stop_after=3), interruption=interruption
    )
    _note_requests(play, 3)  # type: ignore[arg-type]
    return interruption.reason


@pytest.mark.parametrize("reason", ["SIGUSR1", "SIGTERM", "request on another rank"])
def test_a_run_that_a_signal_stopped_starts_again(job: Job, reason: str) -> None:
    assert job.start(75, "step-00000005", reason) == 75
    assert job.asked == AGAIN


@pytest.mark.parametrize(
    "reason_of", [reason_of_a_stop_file, reason_of_a_stop_file_beside_a_signal, reason_of_stop_after]
)
def test_a_run_that_its_user_stopped_ends_the_job(job: Job, reason_of: Callable[[Path], str | None]) -> None:
    job.start(75, "step-00000005", "SIGUSR1")
    assert job.start(75, "step-00000009", reason_of(job.run)) == 75
    assert job.asked == ""
    job.start(75, "step-00000010", "SIGUSR1")  # submitted again, what was asked before is past
    assert job.asked == AGAIN


def test_a_stop_file_ends_a_chain_and_a_time_limit_hands_over(tmp_path: Path, fake_program: FakeProgram) -> None:
    chain = Job(tmp_path, fake_program, array=4)
    assert [chain.start(75, "step-00000005", "SIGUSR1"), chain.asked] == [75, ""]
    assert [chain.start(75, "step-00000006", "stop file"), chain.asked] == [75, STOP_CHAIN]


def test_a_program_without_a_run_directory_starts_again_after_75(tmp_path: Path, fake_program: FakeProgram) -> None:
    other = Job(tmp_path, fake_program, run=None)
    for _ in range(5):
        other.start(75)
        assert other.asked == AGAIN


def test_a_failure_starts_again_in_the_job_then_through_the_queue_then_ends(job: Job) -> None:
    seen = []
    for _ in range(3):
        assert job.start(139) == 139
        seen.append((job.starts_of_ranks, job.asked))
    # Two starts of the ranks in the first job, the second of them requeued; so is the third, and the fourth ends.
    assert seen == [(2, AGAIN), (1, AGAIN), (1, "")]
    job.start(137)  # the user has it started again, and it counts afresh
    assert (job.starts_of_ranks, job.asked) == (2, AGAIN)


@pytest.mark.parametrize("code", [1, 5, 134, 137, 139, 143, 255])
def test_a_hardware_fault_does_not_end_a_chain(tmp_path: Path, fake_program: FakeProgram, code: int) -> None:
    chain = Job(tmp_path, fake_program, array=4)
    assert [chain.start(code), chain.starts_of_ranks, chain.asked] == [code, 2, ""]


def test_healthy_starts_do_not_count_as_lost(job: Job) -> None:
    for number in range(6):
        job.start(75, f"step-0000000{number}", "SIGUSR1")
    job.start(143)
    assert (job.starts_of_ranks, job.asked) == (2, AGAIN)


def test_a_new_checkpoint_counts_afresh(job: Job) -> None:
    job.start(137)
    job.start(137, "step-00000005")  # the first start in the job saves, the second does not
    assert (job.starts_of_ranks, job.asked) == (3, AGAIN)


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_done_and_refused_runs_are_not_started_again(job: Job, code: int) -> None:
    assert job.start(code, "step-00000005") == code
    assert (job.starts_of_ranks, job.asked) == (1, "")
