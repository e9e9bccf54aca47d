"""What happens when a step goes wrong. One object decides, from numbers that are equal on every rank.

    non-finite loss or gradient   the step is not applied and its batch is skipped
    loss > spike_factor * median  (of the last 64 applied steps, from the 16th on), and by 1 at least, so that a loss
                                  near 0 may vary: the same
    more than `max_skipped` in a row, or a quarter of the last 64 steps: roll back
    roll back                     to the newest checkpoint from before the drift; its batches are not met again.
                                  Without a checkpoint the batch is skipped and the run goes on
    more than `rollbacks` of them within `rollback_window` steps: the run gives up (exit 4)

A single spike that was not applied has changed no weight, so there is nothing to go back to. Where many steps in a row
go wrong, the weights were spoilt before the first of them: `drift_start` looks for that in the losses and gradient
norms, and the batches from there on are passed over, for the same weights would meet the same batches again (Chowdhery
et al., "PaLM", JMLR 2023, section 5.1, skip the batches around a spike in the same way).

A skipped batch takes its step number with it: the schedule and the data position move on, the weights do not.
Rollbacks are written to `policy.json` before the run goes on, so a crash right after a rollback does not forget it.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.durable import write_durably
from data_pipeline.errors import GaveUpError
from pretrain.configuration.schema import PolicyConfig

POLICY = "policy.json"
WINDOW = 64
SETTLED = 16
REMEMBERED = 256  # steps in which the start of a drift is looked for
LEAST_JUMP = 1.0  # of a cross-entropy, in nats: less is no divergence, whatever the ratio
_OFF_DEVIATIONS, _OFF_NORM = 4.0, 3.0  # of an ordinary step's loss in robust deviations; of its norm over the median
_DEVIATION_OF_MAD = 1.4826  # a normal distribution's deviation over its median absolute deviation
_DRIFT_SHARE = 0.75  # of the steps from the start of a drift on that look off


class StepDecision(Enum):
    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "roll back"


class Taken(NamedTuple):
    """An applied step: the mean loss over ranks and micro-batches, and the gradient's norm."""

    step: int
    loss: float
    norm: float


@dataclass(frozen=True)
class Rollback:
    """Go back to a checkpoint of at most `before` steps; then pass over `passed_over`, the batches of the drift."""

    before: int
    passed_over: tuple[int, ...]


class DivergencePolicy:
    """kept: what `policy.json` says, as the leader has read it (`read_policy`)."""

    def __init__(self, config: PolicyConfig, run: Path, kept: Mapping[str, Any] | None, *, leader: bool) -> None:
        self.config = config
        kept = kept or {}
        self.skipped_steps: set[int] = set(kept.get("passed_over", ()))
        self._rolled_back: list[int] = list(kept.get("rolled_back", ()))  # the steps that did it
        self._taken: deque[Taken] = deque(maxlen=REMEMBERED)
        self._skipped: list[int] = []  # in a row
        self._outcomes: deque[bool] = deque(maxlen=WINDOW)
        self._path, self._leader = run / POLICY, leader

    def decide(self, step: int, loss: float) -> StepDecision:
        """Before the update, from the mean loss over ranks and micro-batches."""
        if not math.isfinite(loss):
            return StepDecision.SKIP
        factor, recent = self.config.spike_factor, [taken.loss for taken in self._taken][-WINDOW:]
        if factor is not None and len(recent) >= SETTLED:
            median = statistics.median(recent)
            if loss > factor * abs(median) and loss - median > LEAST_JUMP:
                return StepDecision.SKIP
        return StepDecision.APPLY

    def record(self, step: int, loss: float, norm: float, applied: bool) -> StepDecision:
        """After the update; ROLL_BACK where too many were not applied, in a row or of the last 64."""
        self._outcomes.append(applied)
        if applied:
            self._taken.append(Taken(step, loss, norm))
            self._skipped.clear()
            return StepDecision.APPLY
        self._skipped.append(step)
        many = self._outcomes.count(False) > max(self.config.max_skipped, WINDOW // 4)
        return StepDecision.ROLL_BACK if many or len(self._skipped) > self.config.max_skipped else StepDecision.SKIP

    def roll_back(self, step: int) -> Rollback:
        """Count one rollback at `step`, remember durably which batches are passed over. Raises GaveUpError after too
        many.
        """
        self._rolled_back.append(step)
        lately = [there for there in self._rolled_back if step - there < self.config.rollback_window]
        if len(lately) > self.config.rollbacks:
            raise GaveUpError(
                f"gave up at step {step} after {self.config.rollbacks} rollbacks within "
                f"{self.config.rollback_window} steps: losses are non-finite or spike again and again. Look at "
                "events.jsonl; go on with a smaller rate (optimizer.lr=... --allow-change optimizer.lr), or raise "
                "training.policy.rollbacks"
            )
        first = self._skipped[0] if self._skipped else step
        before = drift_start(list(self._taken), first)
        passed_over = tuple(range(before, step + 1))
        self.skipped_steps.update(passed_over)
        self._skipped.clear()
        self._outcomes.clear()
        self._taken.clear()
        if self._leader:
            kept = {"passed_over": sorted(self.skipped_steps), "rolled_back": self._rolled_back}
            write_durably(self._path, json.dumps(kept))
        return Rollback(before, passed_over)

    def state(self) -> dict[str, Any]:
        taken = [list(taken) for taken in self._taken]
        return {"taken": taken, "skipped": self._skipped, "outcomes": list(self._outcomes)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Checkpoints of earlier versions hold no history of steps: it begins afresh then."""
        self._taken = deque((Taken(*taken) for taken in state.get("taken", ())), maxlen=REMEMBERED)
        self._skipped = list(state["skipped"])
        self._outcomes = deque(state.get("outcomes", ()), maxlen=WINDOW)


def read_policy(run: Path) -> dict[str, Any] | None:
    """What earlier rollbacks of the run have left; None where there were none."""
    path = run / POLICY
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def drift_start(taken: Sequence[Taken], first_bad: int) -> int:
    """The step at which the applied steps before `first_bad` began to differ from the older half of them, by loss or
    by gradient norm: the earliest from which on three quarters look off. `first_bad` where none do.
    """
    if len(taken) < 2 * SETTLED:
        return first_bad
    older = taken[: len(taken) // 2]
    losses, norms = [one.loss for one in older], [one.norm for one in older if math.isfinite(one.norm)]
    middle = statistics.median(losses)
    deviation = _DEVIATION_OF_MAD * statistics.median(abs(loss - middle) for loss in losses)
    usual_norm = statistics.median(norms) if norms else math.inf
    off = [one.loss > middle + _OFF_DEVIATIONS * deviation or one.norm > _OFF_NORM * usual_norm for one in taken]
    start, count = first_bad, 0
    for place in range(len(taken) - 1, len(older) - 1, -1):
        count += off[place]
        if off[place] and count >= _DRIFT_SHARE * (len(taken) - place):
            start = taken[place].step
    return start
