"""`internimage evaluate`: a checkpoint on a set, every score that both allow, written into the run."""

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from pretrain.evaluation.loading import load_module, untrained_like
from pretrain.evaluation.results import Result, put_beside, write_result
from pretrain.tasks.task import task_of

UNTRAINED = "untrained"


def evaluate(
    checkpoint: Path | str,
    data: Path | str,
    *,
    tasks: Sequence[str] = (),
    which: str = "ema",
    batch_size: int = 64,
    output: Path | str | None = None,
    untrained: bool = True,
    label: str = "",
) -> dict[str, Result]:
    """Score `checkpoint` (a run directory or one of its checkpoints) on the set in `data`.

    Args:
        tasks: evaluations that the run's task knows; by default all that the model and the set allow.
        which: "ema" or "model" weights.
        output: the run directory to write `evaluation/NAME.json` into; by default the checkpoint's own.
        untrained: also score the same model with its initial weights, and put that beside each score.
        label: put before the names of the results, where one run is evaluated in several ways.

    Returns the results by name. Raises UserError for an unknown evaluation, or one that model or set do not allow.
    """
    module, config = load_module(checkpoint, which)
    task = task_of(config)
    known = ", ".join(task.evaluations) or "none"
    if unknown := [name for name in tasks if name not in task.evaluations]:
        raise UserError(f"evaluation {unknown[0]!r}: task {task.name} has {known}")
    chosen = list(dict.fromkeys(tasks)) or task.allowed(module, data, config)
    if not chosen:
        raise UserError(
            f"{data}: neither this model nor this set allows any evaluation of task {task.name} ({known}): "
            "retrieval needs captions and a text tower, zero-shot class names and a text tower, top1 a classifier"
        )
    scored = {name: task.evaluate(name, module, data, config, batch_size=batch_size) for name in chosen}
    if untrained:
        fresh = untrained_like(module, config)
        for name in chosen:
            beside = task.evaluate(name, fresh, data, config, batch_size=batch_size)
            scored[name] = put_beside(scored[name], UNTRAINED, beside)
    folder = Path(output) if output is not None else run_of(checkpoint)
    results = {}
    for name, result in scored.items():
        result["weights"] = {"ema": "EMA weights", "model": "trained weights"}[which]
        full = f"{label}-{name}" if label else name
        results[full] = result
        write_result(folder, full, result)
    return results


def run_of(checkpoint: Path | str) -> Path:
    """The run directory that a checkpoint path belongs to: RUN itself, or RUN of RUN/checkpoints/step-00001000."""
    path = Path(checkpoint).resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path
