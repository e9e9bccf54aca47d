"""What watches the loop: metrics and progress on rank 0, the task's alarms, the profiler on every rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.configuration.schema import TrainingConfig
from pretrain.training.distributed import DistributedContext
from pretrain.training.logging.kinds import EventKind
from pretrain.training.logging.profiling import Profiler
from pretrain.training.logging.progress import Progress
from pretrain.training.logging.record import EventLog, MetricsLog


class RunLog:
    """config: the whole configuration as plain values, for Weights & Biases. alarms: of the task's module."""

    def __init__(
        self,
        run: Path,
        start: int,
        total_steps: int,
        settings: TrainingConfig,
        config: dict[str, Any],
        alarms: Callable[[dict[str, float]], list[str]],
        events: EventLog,
        context: DistributedContext,
    ) -> None:
        self._alarms, self._events = alarms, events
        self.progress = Progress(total_steps, start, shown=context.leader)
        self._metrics = MetricsLog(run, start, settings.wandb, config) if context.leader else None
        self._profiler = Profiler(settings.profile, run, context.rank)
        self._profiler.step(start)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log what `step` steps have given; averaged over ranks already."""
        if self._metrics is None:
            return
        self._metrics.write(step, values)
        self.progress.show(step, values["loss"], values["lr"])
        for alarm in self._alarms(values):
            self._events(EventKind.ALARM, step=step, message=alarm)

    def validated(self, step: int, title: str, score: float) -> None:
        """A score of the weights after `step` steps."""
        if self._metrics is not None:
            self._metrics.add(step, {title: score})
            self.progress.say(f"step {step}: {title} {score:.4f}")

    def step_ended(self, step: int) -> None:
        self._profiler.step(step)

    def rewind(self, step: int) -> None:
        """The run went back to `step`."""
        if self._metrics is not None:
            self._metrics.rewind(step)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._profiler.close()
