"""`internimage evaluate`: a checkpoint on a set, every score that both allow, written into the run."""

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from pretrain.configuration.schema import RunConfig
from pretrain.evaluation.classification import TEMPLATES, top1, zero_shot
from pretrain.evaluation.loading import load_task, tokenizer_of, untrained_task
from pretrain.evaluation.results import Result, put_beside, write_result
from pretrain.evaluation.retrieval import retrieval
from pretrain.evaluation.sets import describe, trained_classes
from pretrain.objectives import Task

TASKS = ("retrieval", "zero-shot", "top1")
UNTRAINED = "untrained"


def evaluate(
    checkpoint: Path | str,
    data: Path | str,
    *,
    tasks: Sequence[str] = (),
    which: str = "ema",
    batch_size: int = 64,
    output: Path | str | None = None,
    templates: Sequence[str] = TEMPLATES,
    untrained: bool = True,
    label: str = "",
) -> dict[str, Result]:
    """Score `checkpoint` (a run directory or one of its checkpoints) on the set in `data`.

    Args:
        tasks: of TASKS; by default all that the model and the set allow.
        which: "ema" or "model" weights.
        output: the run directory to write `evaluation/NAME.json` into; by default the checkpoint's own.
        templates: prompts of zero-shot classification.
        untrained: also score the same model with its initial weights, and put that beside each score.
        label: put before the names of the results, where one run is evaluated in several ways.

    Returns the results by name. Raises UserError for an unknown task, or one that model or set do not allow.
    """
    if unknown := [name for name in tasks if name not in TASKS]:
        raise UserError(f"evaluation task {unknown[0]!r}: choose of {', '.join(TASKS)}")
    task, config = load_task(checkpoint, which)
    chosen = list(dict.fromkeys(tasks)) or allowed_tasks(task, data, config)
    if not chosen:
        raise UserError(
            f"{data}: neither this model nor this set allows any of {', '.join(TASKS)}: "
            "retrieval needs captions and a text tower, zero-shot class names and a text tower, top1 a classifier"
        )
    scored = {name: _score(name, task, data, config, batch_size, templates) for name in chosen}
    if untrained:
        rows = task.image.num_classes
        beginner = untrained_task(config, rows)
        for name in chosen:
            scored[name] = put_beside(
                scored[name], UNTRAINED, _score(name, beginner, data, config, batch_size, templates)
            )
    folder = Path(output) if output is not None else run_of(checkpoint)
    results = {}
    for name, result in scored.items():
        result["weights"] = {"ema": "averaged weights", "model": "trained weights"}[which]
        full = f"{label}-{name}" if label else name
        results[full] = result
        write_result(folder, full, result)
    return results


def allowed_tasks(task: Task, data: Path | str, config: RunConfig) -> list[str]:
    """What the model has the parts for and the set the words or labels."""
    about = describe(data)
    words, own = hasattr(task, "text"), about.distinct or ()
    rows = trained_classes(config) or own
    allowed = {
        "retrieval": words,
        "zero-shot": words and bool(own),
        "top1": bool(set(own) & set(rows)) and task.image.num_classes == len(rows),
    }
    return [name for name in TASKS if allowed[name]]


def run_of(checkpoint: Path | str) -> Path:
    """The run directory that a checkpoint path belongs to: RUN itself, or RUN of RUN/checkpoints/step-00001000."""
    path = Path(checkpoint).resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _score(
    name: str, task: Task, data: Path | str, config: RunConfig, batch_size: int, templates: Sequence[str]
) -> Result:
    if name == "top1":
        return top1(task, data, config, batch_size=batch_size)
    tokenizer = tokenizer_of(config)
    if name == "zero-shot":
        return zero_shot(task, data, config, tokenizer=tokenizer, templates=templates, batch_size=batch_size)
    return retrieval(task, data, config, tokenizer=tokenizer, batch_size=batch_size)
