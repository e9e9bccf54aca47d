"""Where a run stands, from the files that it leaves: no rank is asked, and Slurm only if it is here.

events.jsonl    started, saved, ended, why        restarts.jsonl    every end that a launcher judged
metrics.jsonl   step, rate, slowest ranks         job.json          the Slurm job that was submitted last
"""

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from launch.restarting import HISTORY, last_entries, last_events, newest_checkpoint
from launch.slurm import JOB

_ALIVE, _ENDED = ("start", "resume"), ("done", "stopped", "gave_up", "failed", "hang", "grace_exceeded")
_TAIL_BYTES = 1 << 18
_SILENT_SECONDS = 600.0  # without a logged step, or ten times the usual distance of two


@dataclass(frozen=True)
class Status:
    """state: running, silent, done, stopped, gave_up, failed, hang, or new (a folder without a start)."""

    run: str
    state: str
    why: str | None = None
    step: int = 0
    total_steps: int | None = None
    checkpoint: str = "none"
    loss: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    last_logged: float | None = None
    starts: int = 0
    restarts: list[str] = field(default_factory=list)
    slowest: str | None = None
    job: str | None = None
    events: list[str] = field(default_factory=list)


def status(run: Path, now: float | None = None) -> Status:
    """Raises UserError where `run` is no run directory."""
    if not (run / "config.yaml").is_file() and not (run / "events.jsonl").is_file():
        raise UserError(f"{run}: no run directory (no config.yaml, no events.jsonl)")
    now = time.time() if now is None else now
    events = last_events(run)
    rows = last_entries(run / "metrics.jsonl", _TAIL_BYTES)
    last = rows[-1] if rows else {}
    state, why = state_of(events, rows, now)
    step = int(last.get("step", 0))
    starts = [event for event in events if event.get("kind") in _ALIVE]
    total = next((int(e["total_steps"]) for e in reversed(starts) if e.get("total_steps")), None)
    left = None
    if state == "running" and total is not None and last.get("step_ms"):
        left = (total - step) * float(last["step_ms"]) / 1e3
    return Status(
        run=str(run),
        state=state,
        why=why,
        step=step,
        total_steps=total,
        checkpoint=newest_checkpoint(run),
        loss=_number(last.get("loss")),
        images_per_second=_number(last.get("images_per_second")),
        seconds_left=left,
        last_logged=float(last["time"]) if "time" in last else None,
        starts=len(starts),
        restarts=[_restart(entry) for entry in last_entries(run / HISTORY, _TAIL_BYTES)[-5:]],
        slowest=_slowest(last),
        job=job_of(run),
        events=[_event(event) for event in events[-5:]],
    )


def state_of(events: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], now: float) -> tuple[str, str | None]:
    """(state, reason), from events and logged steps, oldest first. Pure."""
    for event in reversed(events):
        kind = str(event.get("kind"))
        if kind in _ENDED:
            return kind, event.get("reason") or event.get("message")
        if kind in _ALIVE:
            seen = [float(entry["time"]) for entry in (*events[-1:], *rows[-1:]) if "time" in entry]
            quiet = now - max(seen, default=now)
            apart = float(rows[-1]["time"]) - float(rows[-2]["time"]) if len(rows) > 1 else 0.0
            if quiet > max(_SILENT_SECONDS, 10 * apart):
                return "silent", f"nothing written for {duration(quiet)}: killed without a word, or hanging"
            return "running", None
    return "new", None


def job_of(run: Path) -> str | None:
    """The run's Slurm job and what Slurm says of it; None where none was submitted."""
    try:
        number = str(json.loads((run / JOB).read_text(encoding="utf-8"))["number"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if shutil.which("squeue") is None:
        return f"{number} (no Slurm on this machine)"
    answer = subprocess.run(
        ["squeue", "--noheader", "--jobs", number, "--format", "%T %R"], capture_output=True, text=True
    )
    said = answer.stdout.strip().splitlines()
    return f"{number} {said[0] if said else 'is no longer queued'}"


def duration(seconds: float) -> str:
    """As 3 d 4 h, 2 h 5 min, 40 s."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 1:
        return f"{int(days)} d {int(hours % 24)} h"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(minutes)} min {int(seconds % 60)} s" if minutes >= 1 else f"{int(seconds)} s"


def describe(found: Status, now: float | None = None) -> str:
    """One run for people."""
    now = time.time() if now is None else now
    lines = [f"{found.run}: {found.state}" + (f" ({found.why})" if found.why else "")]
    of = f" of {found.total_steps:,}" if found.total_steps else ""
    step = f"step {found.step:,}{of}, checkpoint {found.checkpoint}"
    if found.loss is not None:
        step += f", loss {found.loss:.4f}"
    if found.images_per_second is not None:
        step += f", {found.images_per_second:,.0f} images/s"
    if found.seconds_left is not None:
        step += f", {duration(found.seconds_left)} left"
    if found.last_logged is not None:
        step += f"; logged {duration(max(0.0, now - found.last_logged))} ago"
    lines.append(step)
    lines += [f"slowest: {found.slowest}"] if found.slowest else []
    lines += [f"Slurm job: {found.job}"] if found.job else []
    lines += [f"starts: {found.starts}", *(f"  {line}" for line in found.restarts)] if found.starts > 1 else []
    lines += ["last events:", *(f"  {line}" for line in found.events)] if found.events else []
    return "\n".join([lines[0], *(f"  {line}" for line in lines[1:])])


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _slowest(row: dict[str, Any]) -> str | None:
    if "slowest_rank" not in row:
        return None
    return (
        f"rank {int(row['slowest_rank'])}, {row['slowest_rank_ms']:.0f} ms a step where the median is "
        f"{row['median_rank_ms']:.0f}"
    )


def _restart(entry: dict[str, Any]) -> str:
    where = f", first rank {entry['rank']} on {entry['node']}" if entry.get("node") else ""
    return f"{_clock(entry)} exit {entry.get('code')}{where}: {entry.get('action')} ({entry.get('why')})"


def _event(event: dict[str, Any]) -> str:
    what = event.get("message") or event.get("reason") or ""
    step = f" at step {event['step']}" if "step" in event else ""
    return f"{_clock(event)} {event.get('kind')}{step}{': ' if what else ''}{str(what).splitlines()[0] if what else ''}"


def _clock(entry: dict[str, Any]) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(float(entry.get("time", 0))))
