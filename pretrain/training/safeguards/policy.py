"""What happens when a step goes wrong. One object decides, from numbers that are equal on every rank.

    non-finite loss or gradient   the step is not applied and its batch is skipped;
                                  more than `max_skipped` in a row: roll back
    loss > spike_factor * median  (of the last 64 applied steps, from the 16th on), and by 1 at least, so that a loss
                                  near 0 may vary: the step is not applied: roll back
    roll back                     the last complete checkpoint is loaded and the offending batches are skipped;
                                  without a checkpoint the batch is skipped and the run goes on
    more than `rollbacks` of them the run gives up (exit 4)

A skipped batch takes its step number with it: the schedule and the data position move on, the weights do not.
Rollbacks are written to `policy.json` before the run goes on, so a crash right after a rollback does not forget it.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from data_pipeline.durable import write_durably
from data_pipeline.errors import GaveUpError
from pretrain.configuration.schema import PolicyConfig

WINDOW = 64
SETTLED = 16
LEAST_JUMP = 1.0  # of a cross-entropy, in nats: less is no divergence, whatever the ratio


class StepDecision(Enum):
    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "roll back"


class DivergencePolicy:
    def __init__(self, config: PolicyConfig, run: Path, *, leader: bool) -> None:
        self.config = config
        self.skipped_steps: set[int] = set()
        self.rollbacks = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._skipped: list[int] = []
        self._path, self._leader = run / "policy.json", leader
        if self._path.exists():
            kept = json.loads(self._path.read_text())
            self.skipped_steps, self.rollbacks = set(kept["passed_over"]), kept["rollbacks"]

    def decide(self, step: int, loss: float) -> StepDecision:
        """Before the update, from the mean loss over ranks and micro-batches."""
        if not math.isfinite(loss):
            return StepDecision.SKIP
        factor = self.config.spike_factor
        if factor is not None and len(self._losses) >= SETTLED:
            median = statistics.median(self._losses)
            if loss > factor * abs(median) and loss - median > LEAST_JUMP:
                self._skipped.append(step)
                return StepDecision.ROLL_BACK
        return StepDecision.APPLY

    def record(self, step: int, loss: float, applied: bool) -> StepDecision:
        """After the update; ROLL_BACK when too many in a row were not applied."""
        if applied:
            self._losses.append(loss)
            self._skipped.clear()
            return StepDecision.APPLY
        self._skipped.append(step)
        return StepDecision.ROLL_BACK if len(self._skipped) > self.config.max_skipped else StepDecision.SKIP

    def roll_back(self) -> list[int]:
        """Count one rollback, remember the offending steps durably and return them. Raises GaveUpError after too
        many.
        """
        self.rollbacks += 1
        offending = sorted(set(self._skipped))
        if self.rollbacks > self.config.rollbacks:
            raise GaveUpError(
                f"gave up at step {offending[-1]} after {self.config.rollbacks} rollbacks: "
                "losses are non-finite or spike again and again. Look at events.jsonl; lower optimizer.lr, or raise "
                "training.policy.rollbacks to go on"
            )
        self.skipped_steps.update(offending)
        self._skipped.clear()
        self._losses.clear()
        if self._leader:
            kept = {"passed_over": sorted(self.skipped_steps), "rollbacks": self.rollbacks}
            write_durably(self._path, json.dumps(kept))
        return offending

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "skipped": self._skipped}

    def load(self, state: Mapping[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._skipped = list(state["skipped"])
