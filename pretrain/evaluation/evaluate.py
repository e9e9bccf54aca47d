"""`internimage evaluate`: a checkpoint on a set, every score that both allow, written into the run."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from pretrain.configuration.schema import RunConfig
from pretrain.evaluation.loading import load_module, untrained_like
from pretrain.evaluation.results import Result, put_beside, write_result
from pretrain.tasks.module import TaskModule
from pretrain.tasks.task import Task, task_of
from pretrain.training.checkpoint.disk import AUTO, run_of

UNTRAINED = "untrained"
_log = logging.getLogger(__name__)


def evaluate(
    checkpoint: Path | str,
    data: Path | str,
    *,
    tasks: Sequence[str] = (),
    which: str = "ema",
    choice: str = AUTO,
    classes: Sequence[str] | None = None,
    batch_size: int = 64,
    output: Path | str | None = None,
    untrained: bool = True,
    label: str = "",
    say: Callable[[str], None] = _log.info,
) -> dict[str, Result]:
    """Score `checkpoint` (a run directory or one of its checkpoints) on the set in `data`.

    Args:
        tasks: evaluations that the run's task knows; by default all that the model and the set allow.
        which: "ema" or "model" weights.
        choice: of a run's checkpoints: "best", "latest", the number of a step, or "auto", the best where there is one.
        classes: names of the classifier's rows; by default those that the checkpoint keeps.
        output: the run directory to write `evaluation/NAME.json` into; by default the checkpoint's own.
        untrained: also score the same model with its initial weights, and put that beside each score.
        label: put before the names of the results, where one run is evaluated in several ways.
        say: told which checkpoint is scored, and which evaluations are left out and why.

    Returns the results by name. Raises UserError for an unknown evaluation, or one that model or set do not allow.
    """
    loaded = load_module(checkpoint, which, choice)
    module, config, found = loaded
    names, task = classes or loaded.classes, task_of(config)
    say(f"scored: {found.path}, {found.title}, {found.weights_title(which)}")
    known = ", ".join(task.evaluations) or "none"
    if unknown := [name for name in tasks if name not in task.evaluations]:
        raise UserError(f"evaluation {unknown[0]!r}: task {task.name} has {known}")
    wanted = list(dict.fromkeys(tasks)) or task.evaluations
    refused = {name: why for name in wanted if (why := task.refusal(name, module, data, classes=names))}
    reasons = [f"{name}: {why}" for name, why in refused.items()]
    chosen = [name for name in wanted if name not in refused]
    if not chosen or (tasks and refused):
        raise UserError("\n".join([f"{data}: cannot be evaluated so", *reasons]))
    for reason in reasons:
        say(f"left out: {reason}")
    scored = _scored(task, chosen, module, data, config, names, batch_size)
    if untrained:
        fresh = untrained_like(module, config)
        for name, beside in _scored(task, chosen, fresh, data, config, names, batch_size).items():
            scored[name] = put_beside(scored[name], UNTRAINED, beside)
    folder = Path(output) if output is not None else run_of(checkpoint)
    results = {}
    for name, result in scored.items():
        result |= {"weights": found.weights_title(which), "checkpoint": found.title}
        full = f"{label}-{name}" if label else name
        results[full] = result
        write_result(folder, full, result)
    return results


def _scored(
    task: Task,
    names: Sequence[str],
    module: TaskModule,
    data: Path | str,
    config: RunConfig,
    classes: Sequence[str] | None,
    batch_size: int,
) -> dict[str, Result]:
    return {name: task.evaluate(name, module, data, config, classes=classes, batch_size=batch_size) for name in names}
