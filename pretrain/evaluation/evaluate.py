"""`internimage evaluate`: a checkpoint or an export on a set, every score that both allow, written into the run."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from data_pipeline.errors import UserError
from pretrain.evaluation.encoding import HasImageModel
from pretrain.evaluation.knn import knn
from pretrain.evaluation.loading import untrained_like
from pretrain.evaluation.probe import linear_probe
from pretrain.evaluation.results import Result, put_beside, write_result
from pretrain.evaluation.subject import open_subject
from pretrain.tasks.module import TaskModule, image_of
from pretrain.tasks.task import Task, task_of
from pretrain.training.checkpoint.disk import AUTO
from pretrain.training.sharing import sharing

UNTRAINED = "untrained"
_log = logging.getLogger(__name__)


@runtime_checkable
class HasTemplates(Protocol):
    def with_templates(self, templates: Sequence[str]) -> Task:
        """The same task whose zero-shot classification asks with these prompts."""


FITTED = ("linear-probe", "knn")  # on frozen features and a labelled training set: for every task


def evaluate(
    checkpoint: Path | str,
    data: Path | str,
    *,
    tasks: Sequence[str] = (),
    which: str = "ema",
    choice: str = AUTO,
    classes: Sequence[str] | None = None,
    train: Path | str | None = None,
    validation: Path | str | None = None,
    templates: Sequence[str] = (),
    batch_size: int = 64,
    output: Path | str | None = None,
    untrained: bool = True,
    label: str = "",
    say: Callable[[str], None] = _log.info,
) -> dict[str, Result]:
    """Score `checkpoint` on the set in `data`; ranks within `shared_by` share the work, and the leader writes.

    Args:
        checkpoint: a run directory, one of its checkpoints, an exported file or folder, or the authors' weights.
        data: a shard set, or a folder of pictures (evaluation/pictures.py).
        tasks: evaluations that the run's task knows, and FITTED; by default all that model, set and `train` allow.
        which: "ema" or "model" weights.
        choice: of a run's checkpoints: "best", "latest", the number of a step, or "auto", the best where there is one.
        classes: names of the classifier's rows; by default those that the checkpoint keeps.
        train: labelled set that FITTED learn from. validation: chooses the penalty of the linear probe; by default a
            part of `train`.
        templates: of zero-shot classification, each with a {} for the name; by default the name alone.
        output: folder to write `evaluation/NAME.json` into; by default the run, or the exported folder.
        untrained: also score the same model with its initial weights, and put that beside each score.
        label: put before the names of the results, where one run is evaluated in several ways.
        say: told which checkpoint is scored, and which evaluations are left out and why.

    Returns the results by name. Raises UserError for an unknown evaluation, or one that model or set do not allow.
    """
    subject = open_subject(checkpoint, which, choice)
    module, config = subject.module, subject.config
    names, task = classes or subject.classes, _with_templates(task_of(config), templates)
    say(f"scored: {subject.source}, {subject.checkpoint}, {subject.weights}")
    known = (*task.evaluations, *FITTED)
    if unknown := [name for name in tasks if name not in known]:
        raise UserError(f"evaluation {unknown[0]!r}: task {task.name} has {', '.join(known)}")
    wanted = list(dict.fromkeys(tasks)) or [*task.evaluations, *(FITTED if train is not None else ())]

    def refusal(name: str) -> str | None:
        if name in FITTED:
            try:
                image_of(module)
            except UserError as error:
                return str(error)
            return None if train is not None else "it learns from a labelled set: name one (--train SET)"
        if not subject.classifies:
            return "the file has no classifier"
        return task.refusal(name, module, data, classes=names)

    refused = {name: why for name in wanted if (why := refusal(name))}
    reasons = [f"{name}: {why}" for name, why in refused.items()]
    chosen = [name for name in wanted if name not in refused]
    if not chosen or (tasks and refused):
        raise UserError("\n".join([f"{data}: cannot be evaluated so", *reasons]))
    for reason in reasons:
        say(f"left out: {reason}")

    def score(part: TaskModule, name: str) -> Result:
        if name == "knn":
            return knn(cast(HasImageModel, part), str(train), data, config, batch_size=batch_size)
        if name == "linear-probe":
            probed = cast(HasImageModel, part)
            return linear_probe(probed, str(train), validation, data, config, batch_size=batch_size)
        return task.evaluate(name, part, data, config, classes=names, batch_size=batch_size)

    scored = {name: score(module, name) for name in chosen}
    if untrained:
        fresh = untrained_like(module, config)
        scored = {name: put_beside(result, UNTRAINED, score(fresh, name)) for name, result in scored.items()}
    about = {"weights": subject.weights, "checkpoint": subject.checkpoint}
    results = {f"{label}-{name}" if label else name: result | about for name, result in scored.items()}
    folder = Path(output) if output is not None else subject.folder
    if folder is None:
        say("the scores are kept nowhere: a lone file has no folder for them; name one (--output)")
    elif sharing().leader:
        for name, result in results.items():
            write_result(folder, name, result)
    return results


def _with_templates(task: Task, templates: Sequence[str]) -> Task:
    """The task with other prompts. Raises UserError where it has none."""
    if not templates:
        return task
    if not isinstance(task, HasTemplates):
        raise UserError(f"templates are of zero-shot classification, which task {task.name} does not have")
    return task.with_templates(templates)
