"""What changes over a run, as a pure function of the step: lr, EMA decay, teacher momentum.

Steps are counted from 0; a run of `total` steps uses the values of steps 0 .. total - 1. Nothing here has state, so a
resumed run needs no scheduler in its checkpoint.
"""

import math
from dataclasses import dataclass

from data_pipeline.errors import UserError
from pretrain.configuration.schema import EmaConfig, OptimizerConfig, ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """The length of a run, resolved against the size of its data."""

    total_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr_ratio: float
    shape: str
    milestones: tuple[float, ...] = ()

    def lr(self, step: int) -> float:
        """Linear from peak/warmup to the peak, then `shape` down to `min_lr_ratio * peak` at the last step; of shape
        "step" a tenth from each milestone on, the shares of the run that detectors' 1x and 3x schedules drop at.
        """
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return self.peak_lr
        if self.shape == "step":
            passed = sum(step >= share * self.total_steps for share in self.milestones)
            return self.peak_lr * max(self.min_lr_ratio, 0.1**passed)
        length = max(1, self.total_steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / length)
        left = 1.0 - progress if self.shape == "poly" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak_lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * left)


def resolve_schedule(
    schedule: ScheduleConfig, optimizer: OptimizerConfig, *, batch_size: int, epoch_samples: int
) -> Schedule:
    """Steps, warm-up and peak lr. An epoch is `epoch_samples / batch_size` steps, not rounded before multiplying."""

    def steps(epochs: float) -> int:
        return math.ceil(epochs * epoch_samples / batch_size)

    total = schedule.steps if schedule.steps is not None else steps(schedule.epochs or 0.0)
    if schedule.warmup_steps is not None:
        warmup = schedule.warmup_steps
    else:
        warmup = steps(schedule.warmup_epochs) if schedule.warmup_epochs else 0
    if warmup >= total and warmup > 0:
        raise UserError(
            f"schedule: the warm-up ({warmup} steps) is as long as the run ({total} steps); "
            "shorten schedule.warmup_steps or warmup_epochs"
        )
    scale = batch_size / optimizer.lr_batch if optimizer.lr_batch else 1.0
    peak, milestones = optimizer.lr * scale, tuple(schedule.milestones)
    return Schedule(total, warmup, peak, schedule.min_lr_ratio, schedule.name, milestones)


def ema_decay(step: int, total: int, ema: EmaConfig, *, teacher: bool) -> float:
    """Decay of the EMA at `step`: `ema <- decay * ema + (1 - decay) * weights`, once per applied optimizer step.

    With a teacher: cosine from `teacher_start` to `teacher_end` over the run. Without: `decay`, but no more than
    (1 + step) / (10 + step), so that the EMA of a young run is not its initial weights.
    """
    if not teacher:
        return min(ema.decay, (1.0 + step) / (10.0 + step))
    progress = min(1.0, step / max(1, total - 1))
    return ema.teacher_end - (ema.teacher_end - ema.teacher_start) * 0.5 * (1.0 + math.cos(math.pi * progress))
