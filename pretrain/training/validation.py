"""Scores while a run trains: the EMA weights on a held-out set, by all ranks; `best` names the best checkpoint.

    a step that `evaluation.every_steps` divides, or the last one
        -> save -> whole fp32 weights on every rank -> the task's evaluation, each rank on its part of the set
        -> RUN/validation.json [{"step", SCORE}, ...], an event, TensorBoard -> RUN/checkpoints/best

What is scored is what `internimage evaluate` scores: fp32, the average of the weights where the run keeps one. A
request to stop is not kept waiting: all ranks leave the evaluation, and the resumed run begins with it.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from data_pipeline.durable import write_durably
from data_pipeline.errors import UserError
from pretrain.configuration import RunConfig
from pretrain.tasks.module import TaskModule
from pretrain.tasks.task import BatchReader, main_score_of, module_of, task_of
from pretrain.training.checkpoint.disk import complete_checkpoints, mark_best
from pretrain.training.distributed import DistributedContext
from pretrain.training.logging.kinds import EventKind
from pretrain.training.logging.record import EventLog
from pretrain.training.safeguards.interruption import Interruption
from pretrain.training.safeguards.watchdog import Watchdog
from pretrain.training.sharing import shared_by
from pretrain.training.zero.ema import Ema
from pretrain.training.zero.engine import Engine
from pretrain.training.zero.gathered import Gathered, Piece, shared_buffers

HISTORY = "validation.json"
V = TypeVar("V")
History = list[tuple[int, float]]  # (step, score), by step


class _AskedError(Exception):
    """This rank was asked to stop while it evaluated."""


class _LeftError(Exception):
    """Another rank was, and has left the evaluation."""


@dataclass(frozen=True)
class _Leavable(DistributedContext):
    """Ranks in an evaluation, whose only collective is `gather`: one that leaves says so in place of the next one."""

    def gather(self, value: V) -> list[V]:
        said: list[tuple[bool, V]] = super().gather((False, value))
        if any(leaves for leaves, _ in said):
            raise _LeftError
        return [value for _, value in said]

    def leave(self) -> None:
        super().gather((True, None))


class Validation:
    """start: the step that the run goes on from; scores of later ones are forgotten.

    Raises UserError where the task, the model or the set do not allow the evaluation.
    """

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        reader: BatchReader,
        engine: Engine,
        ema: Ema | None,
        context: DistributedContext,
        events: EventLog,
        watchdog: Watchdog,
        interruption: Interruption,
        *,
        start: int,
        total_steps: int,
    ) -> None:
        settings = config.evaluation
        assert settings.every_steps is not None and settings.data is not None, "the schema asks for both"
        self._run, self._config, self._reader = run, config, reader
        self._engine, self._ema, self._context = engine, ema, context
        self._events, self._watchdog, self._interruption = events, watchdog, interruption
        self._every, self._total, self._data = settings.every_steps, total_steps, settings.data
        self._task = task_of(config)
        self._name, self._score = wanted_score(config)
        self._said_at = 0.0
        refusal = context.from_leader(
            lambda: self._task.refusal(self._name, engine.module, settings.data or "", classes=reader.classes)
        )
        if refusal is not None:
            raise UserError(f"evaluation.data: {settings.data} cannot be used for {self._name}: {refusal}")
        self._history: History = []
        self.rewind(start)

    def due(self, step: int) -> bool:
        """After `step` steps, where it has not been done yet."""
        asked = step > 0 and (step % self._every == 0 or step == self._total)
        return asked and all(step != done for done, _ in self._history)

    def rewind(self, step: int) -> None:
        """The run goes on from `step`. Collective."""
        self._history = self._context.from_leader(partial(_forget_beyond, self._run, self._score, step))

    def validate(self, step: int, saved: Callable[[], bool]) -> float | None:
        """The score after `step` steps; None where a request to stop came first. Collective.

        saved: waits for the checkpoint of this step, collectively.
        """
        scored = self._scored()
        self._watchdog.heartbeat()
        if scored is None:
            return None
        self._history.append((step, scored))
        there = saved()
        if self._context.leader:
            write_history(self._run, str(self._score), self._history)
            self._events(EventKind.VALIDATED, step=step, evaluation=self._name, score=self._score, value=scored)
            if there:
                mark_best_of(self._run, self._history)
        return scored

    @property
    def title(self) -> str:
        """What the score is called among the metrics."""
        return f"validation/{self._score}"

    def _scored(self) -> float | None:
        context = self._context
        ranks = _Leavable(context.rank, context.world_size, context.device, context.group, context.device_group)
        module = self._whole_module()
        with ExitStack() as stack:
            for part in module.modules():
                stack.callback(part.register_forward_pre_hook(self._still_here).remove)
            try:
                with shared_by(ranks):
                    result = self._task.evaluate(
                        self._name,
                        module,
                        self._data,
                        self._config,
                        classes=self._reader.classes,
                        batch_size=self._config.evaluation.batch_size,
                    )
                ranks.gather(None)  # nobody goes on before all are done: a rank may still leave
            except _AskedError:
                ranks.leave()
                return None
            except _LeftError:
                return None
        self._score = self._score or str(result["scores"][0]["name"])
        return next(float(entry["value"]) for entry in result["scores"] if entry["name"] == self._score)

    def _still_here(self, module: nn.Module, inputs: object) -> None:
        """Before a layer computes: tell the watchdog, every second; leave where this rank was asked to stop."""
        if time.monotonic() - self._said_at >= 1.0:
            self._said_at = time.monotonic()
            self._watchdog.still_starting()
        if self._interruption.requested:
            raise _AskedError

    def _whole_module(self) -> TaskModule:
        """The task's module with the averaged weights in fp32, whole on every rank. Collective."""
        with self._context.device:  # the values that it draws are overwritten; every step seeds its generators anew
            module = module_of(self._config, classes=self._reader.num_classes).to(self._context.device)
        for mine, theirs in shared_buffers(module, self._engine.module):
            mine.copy_(theirs)
        averages = {}
        if self._ema is not None:
            averages = {f.name: value for f, value in zip(self._ema.fragments, self._ema.values, strict=True)}
        pieces = [Piece(f.name, f.start, averages.get(f.name, f.master)) for f in self._engine.owned]
        whole = {name: parameter.data for name, parameter in module.named_parameters()}
        Gathered(whole, pieces, self._context).fill()
        return module.eval().requires_grad_(False)


def wanted_score(config: RunConfig) -> tuple[str, str | None]:
    """(evaluation of the run's task, score of its result; None: the first one). Raises UserError where there is no such
    evaluation, or none is named and the task has no main score.
    """
    task, settings = task_of(config), config.evaluation
    if settings.name is None:
        main = main_score_of(task)
        return main.evaluation, settings.score or main.score
    if settings.name not in task.evaluations:
        raise UserError(
            f"evaluation.name {settings.name!r}: task {task.name} has {', '.join(task.evaluations) or 'none'}"
        )
    main_score = task.main_score
    ours = main_score is not None and main_score.evaluation == settings.name
    return settings.name, settings.score or (main_score.score if main_score is not None and ours else None)


def best_index(scores: Sequence[float]) -> int:
    """The place of the best score; of equal ones the first, which was trained least."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def read_history(run: Path, score: str | None) -> History:
    """What stands in RUN/validation.json of this score (None: of the one that stands there)."""
    path = run / HISTORY
    if not path.exists():
        return []
    entries: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    found = []
    for entry in entries:
        name = score or _score_in(entry)
        if name in entry:
            found.append((int(entry["step"]), float(entry[name])))
    return found


def _score_in(entry: Mapping[str, Any]) -> str:
    return next(key for key in entry if key != "step")


def write_history(run: Path, score: str, history: Sequence[tuple[int, float]]) -> None:
    entries = [{"step": step, score: value} for step, value in history]
    write_durably(run / HISTORY, json.dumps(entries, indent=1) + "\n")


def mark_best_of(run: Path, history: History) -> None:
    """`best` names the best of those whose checkpoints are there."""
    there = {checkpoint.step for checkpoint in complete_checkpoints(run)}
    scored = [(step, score) for step, score in history if step in there]
    if scored:
        mark_best(run, scored[best_index([score for _, score in scored])][0])


def _forget_beyond(run: Path, score: str | None, step: int) -> History:
    """Of steps that the run does not have any more; the scores that are left, which `best` is of."""
    history = read_history(run, score)
    kept = [entry for entry in history if entry[0] <= step]
    if len(kept) < len(history):
        entries = json.loads((run / HISTORY).read_text(encoding="utf-8"))
        write_history(run, score or _score_in(entries[0]), kept)
        mark_best_of(run, kept)
    return kept
