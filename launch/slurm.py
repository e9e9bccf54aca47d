"""Slurm from Python: a job written as a script, submitted, and asked after.

Slurm's own `srun` starts the ranks - no ssh, no MPI - and each finds its place in Slurm's variables.
"""

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.durable import write_durably
from data_pipeline.errors import UserError
from launch.batch_script import script
from launch.job import SlurmJob

JOB = "job.json"  # in a run directory: the job that was submitted last


@dataclass(frozen=True)
class Submitted:
    """A job that sbatch has taken."""

    number: str
    job: SlurmJob

    def state(self) -> str:
        """PENDING, RUNNING, COMPLETED, ... as Slurm says; UNKNOWN where it has forgotten the job."""
        answer = subprocess.run(["scontrol", "-o", "show", "job", self.number], capture_output=True, text=True)
        words = dict(word.partition("=")[::2] for word in answer.stdout.split() if "=" in word)
        return words.get("JobState", "UNKNOWN")

    def stop(self) -> None:
        """Have the ranks save now, and end the job for good."""
        if self.job.run is None:
            raise UserError(f"job {self.number} has no run directory: scancel {self.number} ends it")
        (Path(self.job.run) / "stop").touch()

    def cancel(self) -> None:
        """End the job at once; nothing is saved beyond the newest checkpoint."""
        subprocess.run(["scancel", self.number], check=False)


def submit(job: SlurmJob) -> str:
    """Write the script to `job.script`, hand it to sbatch, return the job's number. UserError where sbatch refuses."""
    return submit_job(job).number


def submit_job(job: SlurmJob) -> Submitted:
    """As `submit`, with a handle on the job."""
    number = hand_over(script(job), Path(job.script), Path(job.logs))
    if job.run is not None:
        write_durably(Path(job.run) / JOB, json.dumps({"number": number, "script": job.script, "time": time.time()}))
    return Submitted(number, job)


def hand_over(text: str, path: Path, logs: Path) -> str:
    """Writes a script to `path` and hands it to sbatch; returns the job's number."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not found here: submit from a login node, or keep the script with --dry-run > job.sh"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    answer = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, env=environment)
    if answer.returncode != 0:
        raise UserError(f"sbatch refused {path}: {answer.stderr.strip()}")
    return answer.stdout.strip().partition(";")[0]
