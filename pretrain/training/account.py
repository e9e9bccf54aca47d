"""What the reader gave and what of it was bad, over all ranks: judged by all together, and told with the metrics."""

from pathlib import Path
from typing import Any

from data_pipeline.reading.events import count_replaced, read_jsonl
from pretrain.training.processes import Processes
from pretrain.training.record import EVENTS


class Account:
    """Of a reader with `faults` and `progress`; of one without, nothing is counted.

    run, start: what was replaced before step `start` stands in the events of `run`.
    """

    def __init__(self, reader: Any, processes: Processes, run: Path, start: int) -> None:
        self._reader, self._processes = reader, processes
        self._faults = getattr(reader, "faults", None)
        self._before = (
            count_replaced(read_jsonl(run / EVENTS), start) if processes.leader and self._faults is not None else {}
        )

    def mine(self) -> list[float]:
        """This rank's samples and bad samples, to be summed over ranks."""
        return [] if self._faults is None else [float(self._faults.seen), float(self._faults.bad)]

    def judge(self, sums: list[float]) -> None:
        """`sums`: of `mine` over ranks. Raises BadDataError on every rank where too many were bad: one that ended alone
        would leave the others waiting for it."""
        if self._faults is not None and self._faults.too_many(*sums):
            worst = self._processes.gather(self._faults.worst())
            raise self._faults.error(*sums, worst)

    def judge_together(self) -> None:
        """The same, where nothing else is summed. Collective."""
        if self._faults is not None:
            self.judge(self._processes.sum(self.mine()))

    def metrics(self, step: int) -> dict[str, float]:
        """By source, before `step`: samples given, epochs, and samples replaced. Collective.

        After a rollback, what was replaced beyond `step` before it counts already.
        """
        if self._faults is None:
            return {}
        found: dict[str, float] = {}
        progress = self._reader.progress(step)
        bad = self._processes.sum([float(self._faults.replaced[source]) for source in progress])
        for (source, given), count in zip(progress.items(), bad, strict=True):
            found |= {f"data/{what}/{source}": value for what, value in given.items()}
            found[f"data/replaced/{source}"] = count + self._before.get(source, 0)
        return found
