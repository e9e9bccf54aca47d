"""Train until the validation split stops improving. The test set is not looked at here.

    RUN/                 an ordinary run directory, trained in segments of equal length; killed, it continues
    RUN/validation.json  [{"step", SCORE}, ...] one entry a finished segment; SCORE is the task's main score, as "top1"
    RUN/checkpoints/best the segment that was best on validation

The lr is constant after its warm-up, since a decay would have to know the end beforehand; the EMA weights, which are
the ones evaluated, do what the decay would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.errors import STOPPED, StoppedError, UserError
from pretrain.configuration import RunConfig, parse_config
from pretrain.finetuning.finetune import finetune
from pretrain.tasks.task import main_score_of, task_of

EVALUATION_BATCH = 64

Train = Callable[
    [RunConfig, Path | None, Path], int
]  # configuration, source of the weights, run directory -> exit code


@dataclass(frozen=True)
class Plateau:
    """How a run ended. reached: the plateau, rather than the longest length allowed."""

    run: Path
    step: int
    validation: float
    reached: bool
    history: tuple[tuple[int, float], ...]

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / f"step-{self.step:08d}"


def has_plateaued(scores: Sequence[float], patience: int, least_gain: float = 0.0) -> bool:
    """Whether none of the last `patience` scores is more than `least_gain` above the best one before them."""
    if patience < 1:
        raise ValueError(f"patience {patience}: at least 1")
    return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience]) + least_gain


def train_to_plateau(
    config: RunConfig,
    *,
    source: Path | str | None,
    output: Path | str,
    validation: Path | str,
    segment_steps: int,
    patience: int = 3,
    least_gain: float = 0.0,
    least_steps: int = 0,
    head_rows: Path | str | None = None,
    train: Train | None = None,
) -> Plateau:
    """Fine-tune `source` (None: random weights) until the validation score has not risen for `patience` segments.

    Args:
        config: as for `finetune`, with schedule.steps the longest length allowed; its schedule becomes constant.
        validation: folder of the validation set, of the same classes.
        least_steps: no plateau counts before it; random weights may stand at chance for a while.
        head_rows: of the source's classifier, as for `finetune`.
        train: how a segment is run; by default in this process, alone, with `head_rows`.

    Returns where the best segment is. Raises StoppedError (75) where a segment was stopped on request: the same call
    goes on; UserError where one fails or the configuration has no step count.
    """
    from pretrain.evaluation import load_module, value_of
    from pretrain.training.checkpoint.disk import LATEST, find_checkpoint
    from pretrain.training.validation import best_index, mark_best_of, read_history, write_history

    output, source = Path(output), None if source is None else Path(source)
    most = config.schedule.steps
    if most is None or segment_steps < 1:
        raise UserError("training to the plateau needs schedule.steps (not epochs) and segments of at least one step")
    task = task_of(config)
    main = main_score_of(task)
    history = read_history(output, main.score)

    def ended() -> bool:
        return has_plateaued([s for _, s in history], patience, least_gain) and history[-1][0] >= least_steps

    while not history or not (ended() or history[-1][0] >= most):
        end = min((history[-1][0] if history else 0) + segment_steps, most)
        code = (train or partial(_alone, head_rows=head_rows))(segment_config(config, end, most), source, output)
        if code not in (0, STOPPED):
            raise UserError(f"{output}: training up to step {end} ended with exit code {code}; see its events.jsonl")
        if (saved := find_checkpoint(output).step) < end:
            raise StoppedError(f"{output}: stopped and saved at step {saved}; the same command goes on")
        loaded = load_module(output, "ema", LATEST)
        result = task.evaluate(
            main.evaluation,
            loaded.module,
            validation,
            loaded.config,
            classes=loaded.classes,
            batch_size=EVALUATION_BATCH,
        )
        history.append((end, value_of(result, main.score)))
        write_history(output, main.score, history)
        mark_best_of(output, history)
    step, best = history[best_index([s for _, s in history])]
    return Plateau(output, step, best, ended(), tuple(history))


def segment_config(config: RunConfig, end: int, most: int) -> RunConfig:
    """`config` at a constant lr, stopping with a checkpoint after step `end` of `most`."""
    data = config.model_dump()
    data["schedule"] |= {"name": "constant", "steps": most}
    data["training"]["stop_after"] = end if end < most else None
    data["training"]["ema"]["enabled"] = True
    data["checkpoint"] |= {"every_steps": None, "every_minutes": None, "keep": 1}
    return parse_config(data, source="segment of a fine-tuning")


def _alone(config: RunConfig, source: Path | None, output: Path, *, head_rows: Path | str | None) -> int:
    return finetune(config, source=source, output=output, head_rows=head_rows)
