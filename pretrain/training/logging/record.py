"""What a run leaves behind beside its checkpoints: config.yaml, environment.json, events.jsonl, metrics.jsonl,
tensorboard/.

Events are appended by any rank, one line each, flushed: restarts, saves, bad samples, alarms, rollbacks, the end.
Metrics are the leader's. After a crash and after a rollback the lines beyond the restored step are dropped, so that no
step stands there twice. A number that is not finite is written as a string, for JSON has none.
"""

import json
import math
import os
import platform
import sys
import time
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_pipeline.durable import write_durably
from pretrain.training.logging.kinds import EventKind
from pretrain.training.logging.notifying import Notifier

EVENTS, METRICS, ENVIRONMENT, CONFIG = "events.jsonl", "metrics.jsonl", "environment.json", "config.yaml"
EARLIER_EVENTS, WANDB_ID, CONFIG_HISTORY = "events.1.jsonl", "wandb-id.txt", "config-history.jsonl"
LARGEST_EVENTS = 32 * 2**20  # bytes of events.jsonl at a start, about 150,000 lines
_PACKAGES = (
    "internimage-pretrain",
    "torch",
    "deepspeed",
    "timm",
    "open_clip_torch",
    "webdataset",
    "numpy",
    "safetensors",
)


class EventLog:
    """`events(kind, **what)`; also takes one dictionary that has a "kind", as the reader gives."""

    def __init__(self, run: Path, rank: int, notify: Notifier | None = None) -> None:
        self._path, self._rank, self._notify = run / EVENTS, rank, notify

    def __call__(self, kind: EventKind | dict[str, Any], **what: object) -> None:
        if isinstance(kind, dict):
            what = {key: value for key, value in kind.items() if key != "kind"}
            kind = EventKind(kind["kind"])
        entry = {"time": time.time(), "kind": kind, "rank": self._rank, **what}
        line = json.dumps(_plain(entry), default=str, allow_nan=False) + "\n"
        try:
            # One write to a file opened for appending: lines of several ranks do not mix.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        except OSError as error:  # a full disk must not end a run that only wanted to say so
            print(f"events.jsonl: {error}: {line}", file=sys.stderr, flush=True)
        if self._notify is not None:
            self._notify(entry, line)


def turn_over_events(run: Path) -> None:
    """At a start, before anybody writes: a file of events that has grown large becomes `events.1.jsonl`, in place of an
    earlier one. Nothing that a run goes on from stands there.
    """
    path = run / EVENTS
    if path.exists() and path.stat().st_size > LARGEST_EVENTS:
        os.replace(path, run / EARLIER_EVENTS)


class MetricsLog:
    """metrics.jsonl, TensorBoard and, on request, Weights & Biases; the leader's only."""

    def __init__(self, run: Path, start_step: int, wandb_project: str | None, config: dict[str, Any]) -> None:
        self._run = run
        self._open(start_step)
        self._wandb: Any = None
        if wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=wandb_project, dir=str(run), name=run.name, config=config, id=_wandb_id(run), resume="allow"
            )

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        keep_until(self._run / METRICS, step)
        self._file = open(self._run / METRICS, "a", encoding="utf-8")  # noqa: SIM115  kept open for the run
        self._board = SummaryWriter(str(self._run / "tensorboard"), purge_step=step + 1, flush_secs=30)

    def rewind(self, step: int) -> None:
        """The run went back to `step`: drop what was logged beyond it. (Weights & Biases takes nothing back.)"""
        self._file.close()
        self._board.close()
        self._open(step)

    def write(self, step: int, values: dict[str, float]) -> None:
        try:
            self._file.write(json.dumps(_plain({"step": step, "time": time.time(), **values})) + "\n")
            self._file.flush()
        except OSError as error:
            print(f"{METRICS}: {error}", file=sys.stderr, flush=True)
        self.add(step, values)

    def add(self, step: int, values: dict[str, float]) -> None:
        """To TensorBoard and Weights & Biases alone: what metrics.jsonl, with one line a step, has no place for."""
        try:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
        except OSError as error:
            print(f"tensorboard: {error}", file=sys.stderr, flush=True)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        try:
            self._file.close()
            self._board.close()
        except OSError as error:
            print(f"{METRICS}: {error}", file=sys.stderr, flush=True)
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_id(run: Path) -> str:
    """One Weights & Biases run for the whole life of this one, however often it is started."""
    path = run / WANDB_ID
    if not path.exists():
        write_durably(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def keep_until(path: Path, step: int) -> None:
    """Drop lines beyond `step`, and a line that a crash cut."""
    if not path.exists():
        return
    kept, dropped = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            good = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            good = False
        if good:
            kept.append(line)
        else:
            dropped = True
    if dropped:
        write_durably(path, "".join(f"{line}\n" for line in kept))


def environment(world_size: int, device: str) -> dict[str, Any]:
    import torch

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "ranks": world_size,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "packages": {package: installed(package) for package in _PACKAGES},
        "command": sys.argv,
    }
