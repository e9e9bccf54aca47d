"""Steps from equal time, and the runs themselves: ordinary `internimage pretrain` commands, a folder each.

    OUTPUT/plan.json                          cost of a step and steps of every arm; measured once, then fixed
    OUTPUT/runs/ARM/seed-0/stage-0/           a run like any other; `done` in it when it has ended, `gave-up` when it
                                              would not be trained (exit code 4)
    OUTPUT/runs/ARM/seed-0/finetune/

A study that is started again goes on where it was. Every run has one thread, so that the same plan gives the same
figures to the last digit.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.durable import file_sha256, write_durably
from data_pipeline.errors import DONE, GAVE_UP, UserError
from data_pipeline.format.manifest import SET_MANIFEST
from pretrain.configuration import RunConfig, load_config
from pretrain.studies.arms import Arm
from pretrain.training.logging.record import METRICS

ROUNDS = 6  # of which the first is not counted
ENDED, GIVEN_UP = "done", "gave-up"
_CROSS_ENTROPIES = ("loss/text", "loss/category")  # other losses may rise with their targets


@dataclass(frozen=True)
class Settings:
    """seconds: CPU time of the training of one arm. changes: of the configuration (`key.path=value`), for all arms."""

    config: str
    shards: Path
    output: Path
    seconds: float
    seeds: int
    finetune_steps: int
    jobs: int
    changes: tuple[str, ...] = ()

    def common(self) -> tuple[str, ...]:
        return (f"data.sources.0.path={self.shards / 'train'}", *self.changes)


@dataclass(frozen=True)
class Planned:
    """step_seconds: CPU seconds of a step of each stage. steps: of each stage."""

    step_seconds: tuple[float, ...]
    steps: tuple[int, ...]


def plan(settings: Settings, arms: Sequence[Arm], whole: str) -> dict[str, Planned]:
    """Steps of every arm: from OUTPUT/plan.json, or measured now, all arms by turns.

    Raises UserError where the file is of another study, and for an arm of as many steps as `whole` without `whole`.
    """
    alike = [arm.name for arm in arms if arm.equal_steps]
    if alike and whole not in {arm.name for arm in arms}:
        raise UserError(f"arm {alike[0]!r} has as many steps as {whole!r}: study that one too (--only {whole!r})")
    path = settings.output / "plan.json"
    wanted = {
        "seconds": settings.seconds,
        "config": settings.config,
        "changes": list(settings.changes),
        "training_set": file_sha256(settings.shards / "train" / SET_MANIFEST),
    }
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        if {key: held.get(key) for key in wanted} != wanted or not {arm.name for arm in arms} <= held["arms"].keys():
            raise UserError(f"{path} is of a study with other settings; choose another --output")
        return {name: Planned(tuple(p["step_seconds"]), tuple(p["steps"])) for name, p in held["arms"].items()}
    costs = _costs(settings, arms)
    planned: dict[str, Planned] = {}
    for arm in arms:
        share = settings.seconds / len(arm.stages)
        steps = tuple(arm.steps or max(1, int(share / cost)) for cost in costs[arm.name])
        planned[arm.name] = Planned(costs[arm.name], steps)
    for arm in arms:
        if arm.equal_steps:
            planned[arm.name] = Planned(costs[arm.name], planned[whole].steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = wanted | {"arms": {name: asdict(one) for name, one in planned.items()}}
    write_durably(path, json.dumps(content, indent=1) + "\n")
    return planned


def _costs(settings: Settings, arms: Sequence[Arm]) -> dict[str, tuple[float, ...]]:
    """CPU seconds of a step of each stage, the least of several; stages take turns, so that other work hits all."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stages = {
            (arm.name, number): TrainingStep(load_config(settings.config, (*settings.common(), *changes)))
            for arm in arms
            for number, changes in enumerate(arm.stages)
        }
        seen: dict[tuple[str, int], list[float]] = {key: [] for key in stages}
        for _ in range(ROUNDS):
            for key, step in stages.items():
                seen[key].append(step.mean_seconds())
        for step in stages.values():
            step.close()
    finally:
        torch.set_num_threads(threads)
    return {arm.name: tuple(min(seen[arm.name, n][1:]) for n in range(len(arm.stages))) for arm in arms}


class TrainingStep:
    """One training step without the loop around: read, teacher, loss, gradient, optimizer.

    every: of that many steps the last has more to do (`task.dense_every`).
    """

    def __init__(self, config: RunConfig) -> None:
        import torch

        from pretrain.tasks.pretraining.task import Pretraining
        from pretrain.tasks.task import ReaderOptions, module_of, task_of
        from pretrain.training.parameter_groups import parameter_groups

        self.every = config.task.dense_every if isinstance(config.task, Pretraining) else 1
        options = ReaderOptions(config.training.batch_size, 1, 0, 1, 0, lambda _: None, lambda: None)
        self.reader = task_of(config).open_reader(config.data, options)
        self.batches = self.reader.batches(0)
        self.module = module_of(config, classes=self.reader.num_classes).train()
        self.teacher = self.module.teacher()
        trained = {name: one for name, one in self.module.named_parameters() if one.requires_grad}
        groups = parameter_groups([(name, one.shape) for name, one in trained.items()], config.optimizer, None)
        self.optimizers: list[torch.optim.Optimizer] = [
            (torch.optim.Muon if group.muon else torch.optim.AdamW)([trained[name] for name in group.names], 1e-4)
            for group in groups
        ]

    def mean_seconds(self) -> float:
        """CPU seconds of a step, in the mean over `every` of them, of which one of each kind is made."""
        last = self._seconds(self.every - 1)
        return last if self.every == 1 else (last + (self.every - 1) * self._seconds(0)) / self.every

    def _seconds(self, number: int) -> float:
        from pretrain.objectives.keys import StepKeys

        began = time.process_time()
        batch, keys = next(self.batches), StepKeys(0, number)
        taught = self.module.teacher_targets(self.teacher, batch, keys) if self.teacher is not None else None
        self.module.zero_grad()
        self.module(batch, keys, taught, False).total.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return time.process_time() - began

    def close(self) -> None:
        self.reader.close()


def stage_folder(settings: Settings, arm: Arm, seed: int, stage: int = -1) -> Path:
    """The folder of a stage; by default of the last."""
    number = stage % len(arm.stages)
    return settings.output / "runs" / arm.slug / f"seed-{seed}" / f"stage-{number}"


def finetune_folder(settings: Settings, arm: Arm, seed: int) -> Path:
    return stage_folder(settings, arm, seed).parent / "finetune"


def diverged(settings: Settings, arm: Arm, seed: int) -> bool:
    """Whether the arm's training gave up, or ended with no cross-entropy below the one that it began with."""
    folders = [stage_folder(settings, arm, seed, stage) for stage in range(len(arm.stages))]
    return any((folder / GIVEN_UP).exists() or _learnt_nothing(folder / METRICS) for folder in folders)


def _learnt_nothing(metrics: Path) -> bool:
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    logged = [row for row in rows if "loss" in row]
    judged = [name for name in _CROSS_ENTROPIES if len(logged) > 1 and name in logged[0]]
    return bool(judged) and not any(logged[-1][name] < logged[0][name] for name in judged)


def train(settings: Settings, arms: Iterable[Arm], planned: dict[str, Planned]) -> None:
    """Every run that is not done yet, `settings.jobs` at a time. Raises UserError naming the log of one that failed."""
    work = [(arm, seed) for seed in range(settings.seeds) for arm in arms]
    with ThreadPoolExecutor(settings.jobs) as pool:
        for _ in pool.map(lambda one: _train(settings, one[0], one[1], planned[one[0].name]), work):
            pass


def _train(settings: Settings, arm: Arm, seed: int, planned: Planned) -> None:
    rate = () if arm.lr is None else (f"optimizer.lr={arm.lr}",)
    for stage, changes in enumerate(arm.stages):
        folder = stage_folder(settings, arm, seed, stage)
        steps = planned.steps[stage]
        own = [*rate, *settings.common(), *changes, f"schedule.steps={steps}", f"training.seed={seed}"]
        own.append(f"schedule.warmup_steps={min(steps // 10, 60)}")
        if stage:
            own.append(f"initialize_from={stage_folder(settings, arm, seed, stage - 1)}")
        if not _run(["pretrain", settings.config, *own], folder):
            return
    if settings.finetune_steps:
        steps = settings.finetune_steps
        shape = [
            one for one in (*settings.common(), *arm.stages[-1]) if one.startswith(("data.", "model.", "training."))
        ]
        own = [*shape, f"schedule.steps={steps}", f"schedule.warmup_steps={min(steps // 10, 20)}"]
        own += [f"training.seed={seed}", f"initialize_from={stage_folder(settings, arm, seed)}"]
        _run(["pretrain", "demo_finetune", *own], finetune_folder(settings, arm, seed))


def _run(command: list[str], folder: Path) -> bool:
    """Run the command into `folder` where that has not been done; False for one that gave up. Raises UserError where it
    failed otherwise.
    """
    if (folder / ENDED).exists() or (folder / GIVEN_UP).exists():
        return (folder / ENDED).exists()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.log"
    code = _launch([*command, "--output", str(folder), "--processes", "1"], log)
    if code not in (DONE, GAVE_UP):
        raise UserError(f"{folder} ended with exit code {code}; {log} says why. The same command goes on after it")
    write_durably(folder / (ENDED if code == DONE else GIVEN_UP), "")
    return code == DONE


def _launch(command: list[str], log: Path) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        words = [sys.executable, "-m", "launch", *command]
        return subprocess.run(words, stdout=output, stderr=output, env=environment, check=False).returncode
