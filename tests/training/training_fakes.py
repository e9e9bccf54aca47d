"""A small task and reader that training can run on, and processes that run it.

The reader is a pure function of the global position, as the real one is; the task has what tends to break: a norm,
biases, a scalar, a frozen parameter, a buffer that changes (batch statistics), a teacher of a part of it, and
randomness keyed by position.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from warm_ranks import WarmRanks, run_all, serve

from data_pipeline.reading.config import DataConfig
from data_pipeline.reading.faults import FaultLog
from data_pipeline.reading.order.course import Segment, samples_before
from pretrain.configuration import RunConfig, parse_config
from pretrain.configuration.schema import ModelConfig
from pretrain.tasks.module import LossOutput, StepKeys, TaskModule
from pretrain.tasks.task import MainScore, ReaderOptions, Task
from pretrain.training.sharing import sharing

PIXELS, CLASSES, EPOCH, HELD_OUT = 24, 5, 160, 37
HERE = Path(__file__).parent


class FakeBatch(NamedTuple):
    positions: Tensor
    images: Tensor
    labels: Tensor

    def to(self, device: Any) -> "FakeBatch":
        return FakeBatch(*(tensor.to(device) for tensor in self))


def sample(position: int) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(position % EPOCH + 1)
    image = torch.randn(PIXELS, generator=generator)
    return image, int(image[:CLASSES].argmax())


class FakeReader:
    epoch_samples, num_classes, fingerprint = EPOCH, CLASSES, "fake"
    classes, sources = tuple("abcde"), ()

    def __init__(self, options: ReaderOptions) -> None:
        self.batch, self.accumulation = options.batch_size, options.accumulation
        self.rank, self.world = options.rank, options.world_size
        self.faults = FaultLog(0.01, None)

    def progress(self, step: int) -> dict[str, dict[str, float]]:
        return {}

    def batches(self, start_step: int, segments: Sequence[Segment] = ()) -> Iterator[FakeBatch]:
        before = samples_before(segments or [Segment(0, self.batch, (1.0,))], start_step)
        micro_size = self.batch // self.accumulation
        share = micro_size // self.world
        step = start_step
        while True:
            for micro in range(self.accumulation):
                first = before + (step - start_step) * self.batch + micro * micro_size + self.rank * share
                positions = list(range(first, first + share))
                pairs = [sample(position) for position in positions]
                images, labels = torch.stack([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
                yield FakeBatch(torch.tensor(positions), images, labels)
            step += 1

    def close(self) -> None:
        pass


class Body(nn.Module):
    def __init__(self, width: int, checkpointing: bool) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(PIXELS, width), nn.LayerNorm(width), nn.Linear(width, width)
        self.register_buffer("mean", torch.zeros(PIXELS))
        self.checkpointing = checkpointing

    def _layers(self, x: Tensor) -> Tensor:
        return self.outer(F.gelu(self.norm(self.inner(x))))

    def forward(self, x: Tensor) -> Tensor:
        centre = self.mean.clone()
        if self.training and torch.is_grad_enabled():
            self.mean.lerp_(_global_mean(x).to(self.mean.dtype), 0.1)
        x = x.to(self.inner.weight.dtype) - centre.to(self.inner.weight.dtype)
        if self.checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._layers, x, use_reentrant=False)
        return self._layers(x)


@torch.no_grad()
def _global_mean(x: Tensor) -> Tensor:
    """Over the rows of all ranks."""
    mean = x.mean(0)
    if torch.distributed.is_initialized() and (ranks := torch.distributed.get_world_size()) > 1:
        torch.distributed.all_reduce(mean)
        mean /= ranks
    return mean


class FakeTask(TaskModule):
    """Cross-entropy plus a distance to the teacher's features, both means over the rank's rows."""

    def __init__(self, width: int = 33, *, checkpointing: bool = False, teacher: bool = True) -> None:
        super().__init__()
        self.width, self.with_teacher = width, teacher
        self.body = Body(width, checkpointing)
        self.head = nn.Linear(width, CLASSES)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.frozen = nn.Parameter(torch.linspace(0, 1, 7), requires_grad=False)

    def teacher(self) -> nn.Module | None:
        if not self.with_teacher:
            return None
        holder = nn.Module()
        holder.body = Body(self.width, False)
        holder.body.load_state_dict(self.body.state_dict())
        return holder

    def teacher_names(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if name.startswith("body.")] if self.with_teacher else []

    @torch.no_grad()
    def teacher_targets(self, teacher: nn.Module, batch: FakeBatch, keys: StepKeys) -> dict[str, Tensor]:
        return {"features": teacher.body(batch.images)}

    def forward(
        self, batch: FakeBatch, keys: StepKeys, targets: dict[str, Tensor] | None = None, measure: bool = True
    ) -> LossOutput:
        _misbehave(batch, keys)
        noise = torch.stack(
            [
                torch.randn(PIXELS, generator=torch.Generator().manual_seed(keys.step * 100_003 + int(p)))
                for p in batch.positions
            ]
        ).to(batch.images.device)
        features = self.body(batch.images + 0.1 * noise)
        logits = self.head(features).float() * self.scale.float()
        parts = {"class": F.cross_entropy(logits, batch.labels) + 0.0 * self.frozen.float().sum()}
        if targets is not None:
            parts["dense"] = 0.1 * (features.float() - targets["features"].float()).pow(2).mean()
        total = torch.stack(list(parts.values())).sum()
        if _happens("nan", keys.step) and int(batch.positions.min()) % 16 < 4:  # in one sample of one rank
            total = total * float("nan")
        if _happens("nan_gradient", keys.step):  # the loss stays finite
            total = total + torch.sqrt(0.0 * self.scale.sum())
        if _happens("spike", keys.step):
            total = total * 1000.0
        if _happens("drift", keys.step):
            total = total * 3.0  # below what counts as a spike
        return LossOutput(total, {k: v.detach() for k, v in parts.items()}, {"accuracy": _accuracy(logits, batch)})


def _accuracy(logits: Tensor, batch: FakeBatch) -> Tensor:
    return (logits.argmax(1) == batch.labels).float().mean()


def _happens(what: str, step: int) -> bool:
    """FAKE_NAN=3,4 makes steps 3 and 4 non-finite; FAKE_SPIKE, FAKE_DRIFT and FAKE_NAN_GRADIENT alike."""
    return str(step) in os.environ.get(f"FAKE_{what.upper()}", "").split(",")


def _misbehave(batch: FakeBatch, keys: StepKeys) -> None:
    rank = int(os.environ.get("RANK", 0))
    if lineage := os.environ.get("FAKE_LINEAGE"):
        with open(f"{lineage}.{rank}", "a") as file:
            file.write(json.dumps([keys.step, keys.micro, batch.positions.tolist()]) + "\n")
    if sleep := os.environ.get("FAKE_SLEEP"):
        time.sleep(float(sleep))
    if _happens("stall", keys.step):
        time.sleep(1000)
    if rank == 1 and _happens("hang", keys.step):
        time.sleep(1000)
    if rank == 1 and _happens("crash", keys.step):
        raise RuntimeError("a kernel failed")
    if rank == 1 and _happens("abort", keys.step):
        os.abort()
    if rank == 0 and _happens("fill", keys.step):
        _fill_the_disk(Path(os.environ["FAKE_BALLAST"]))
    if rank == 1 and _happens("death", keys.step):
        os.kill(os.getpid(), signal.SIGKILL)


def _fill_the_disk(ballast: Path) -> None:
    """To the last byte."""
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 512)


class Fake(Task):
    """The section of the configuration; FAKE_WIDTH makes another model of the same configuration."""

    evaluations: ClassVar[tuple[str, ...]] = ("nearest",)
    main_score: ClassVar[MainScore | None] = MainScore("nearest", "top1", "top-1 accuracy")

    def build(self, model: ModelConfig, data: DataConfig, *, classes: int) -> FakeTask:
        return FakeTask(int(os.environ.get("FAKE_WIDTH", 33)), checkpointing=model.recompute == "blocks")

    def open_reader(self, data: DataConfig, options: ReaderOptions) -> FakeReader:
        return FakeReader(options)

    def evaluate(
        self,
        name: str,
        module: TaskModule,
        data: Path | str,
        run: RunConfig,
        *,
        classes: Any,
        batch_size: int,
    ) -> dict[str, Any]:
        """Ranks share the samples. Of a set called "asked", rank 1 is asked to stop while it evaluates."""
        if str(data) == "asked" and os.environ.get("RANK") == "1" and os.environ.get("FAKE_ASKED"):
            os.kill(os.getpid(), signal.SIGUSR1)
        ranks = sharing()
        hits = hits_of(module, range(ranks.rank, HELD_OUT, ranks.world_size))
        every = [hit for part in ranks.gather(hits) for hit in part]
        value = sum(every) / len(every)
        return {"scores": [{"name": "other", "value": 0.0}, {"name": "top1", "value": value}]}


@torch.no_grad()
def hits_of(module: Any, positions: Iterable[int]) -> list[bool]:
    pairs = [sample(position) for position in positions]
    logits = module.head(module.body(torch.stack([image for image, _ in pairs])))
    return [int(row.argmax()) == label for row, (_, label) in zip(logits, pairs, strict=True)]


def configuration(**changes: Any) -> RunConfig:
    """Dotted keys with `__` for the dot: configuration(training__zero_stage=2)."""
    raw: dict[str, Any] = {
        "task": {"name": "training_fakes:Fake"},
        "data": {"sources": [{"path": "fake"}]},
        "schedule": {"steps": 12, "warmup_steps": 3},
        "optimizer": {"lr": 1e-2, "clip_grad": 1.0},
        "training": {"batch_size": 16, "precision": "fp32", "log_every": 1, "zero_stage": 1},
        "checkpoint": {"every_steps": 4},
    }
    for key, value in changes.items():
        node = raw
        *parents, last = key.split("__")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return parse_config(raw)


Ranks = list[subprocess.Popen[str]]
Work = RunConfig | dict[Path, RunConfig] | list[tuple[Path, RunConfig]]


def start_ranks(
    config: Work, output: Path, ranks: int, script: str = __file__, **environment: str
) -> list[subprocess.Popen[str]]:
    """One process a rank, running `script` (by default this file). Several configurations run one after the other, also
    after one that stops.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    logs = [output.parent / f"{output.name}-rank{rank}.log" for rank in range(ranks)]
    return _processes([script, *_described(config, output)], logs, environment)


def _described(config: Work, output: Path) -> list[str]:
    """Files of the configurations, each with its run's folder."""
    from pretrain.configuration import dump_config

    work: list[str] = []
    parts = [(output, config)] if isinstance(config, RunConfig) else config
    for number, (where, what) in enumerate(parts.items() if isinstance(parts, dict) else parts):
        described = output.parent / f"{output.name}-{time.monotonic_ns()}-{number}.yaml"
        described.write_text(dump_config(what))
        work += [str(described), str(where)]
    return work


def _processes(
    words: list[str], logs: list[Path], environment: dict[str, str], stdin: int | None = None
) -> list[subprocess.Popen[str]]:
    ranks = len(logs)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank, path in enumerate(logs):
        variables = (
            os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(HERE.parents[1]),
            }
            | ({} if ranks <= torch.cuda.device_count() else {"CUDA_VISIBLE_DEVICES": ""})
            | environment
        )
        if ranks == 1:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                variables.pop(name)
        log = open(path, "a")  # noqa: SIM115  handed to the process
        processes.append(
            subprocess.Popen([sys.executable, *words], env=variables, stdin=stdin, stdout=log, stderr=log, text=True)
        )
    return processes


def finish(processes: list[subprocess.Popen[str]], timeout: float = 150) -> list[int]:
    """Exit codes; the first failure ends the others after a moment, as a launcher does."""
    deadline, failed_at = time.monotonic() + timeout, None
    try:
        while any(process.poll() is None for process in processes):
            now = time.monotonic()
            if failed_at is None and any(process.poll() not in (None, 0) for process in processes):
                failed_at = now
            if now > deadline or (failed_at is not None and now > failed_at + 10):
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [process.wait() for process in processes]


def wait_until(condition: Callable[[], bool], ranks: Ranks) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), "ended before its moment"
        time.sleep(0.002)


WARM = WarmRanks(lambda words: _processes([__file__, *words], [Path(os.devnull)] * 2, {}, subprocess.PIPE))


def run_ranks(config: Work, output: Path, ranks: int, timeout: float = 300, **settings: str) -> list[int]:
    """Exit codes of a run that nobody disturbs. Two ranks of this file's own are those that stay (warm_ranks.py)."""
    if ranks != 2 or "script" in settings:
        return finish(start_ranks(config, output, ranks, **settings), timeout)
    output.parent.mkdir(parents=True, exist_ok=True)
    misbehaving = {name: value for name, value in os.environ.items() if name.startswith("FAKE_")}
    return WARM.run(_described(config, output), output, misbehaving | settings, timeout)


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file that another process may be writing: its last line counts once it is ended."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def metrics(output: Path) -> list[dict[str, Any]]:
    return complete_lines(output / "metrics.jsonl")


def events(output: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = complete_lines(output / "events.jsonl")
    return [event for event in found if kind is None or event["kind"] == kind]


def lineage(path: Path) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """(rank, step, micro, positions) of every forward pass, by rank; a line that a kill cut is dropped."""
    for file in sorted(path.parent.glob(f"{path.name}.*")):
        for line in file.read_text().splitlines():
            try:
                step, micro, positions = json.loads(line)
            except ValueError:
                continue
            yield int(file.suffix[1:]), step, micro, tuple(positions)


def logs(output: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(output.parent.glob(f"{output.name}-rank*.log")))


if __name__ == "__main__":
    from pretrain.training.distributed import leave

    if limit := os.environ.get("FAKE_FILE_LIMIT"):  # a full disk, as a file-size limit shows it
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    if slow := os.environ.get("FAKE_SLOW_COPY"):  # out of the fast folder, of files of this step
        from pretrain.training.checkpoint import saving

        copy_durably = saving.copy_durably

        def copying(source: Path, target: Path) -> None:
            if slow in str(source):
                time.sleep(1000)
            copy_durably(source, target)

        saving.copy_durably = copying
    if sys.argv[1:] == ["--serve"]:
        serve()
        leave(0)
    leave(run_all(sys.argv[1:]))
