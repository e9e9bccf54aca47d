"""What the reader gave and what of it was bad, over all ranks: judged by all together, and told with the metrics."""

from collections.abc import Mapping
from pathlib import Path

from data_pipeline.reading.events import count_replaced, read_jsonl
from pretrain.tasks.task import BatchReader
from pretrain.training.distributed import DistributedContext
from pretrain.training.logging.record import EVENTS


class BadSampleMonitor:
    """Counts the samples that `reader` replaced. before: by source, up to the checkpoint that the run goes on from."""

    def __init__(self, reader: BatchReader, context: DistributedContext, before: Mapping[str, float]) -> None:
        self._reader, self._context, self._before = reader, context, dict(before)

    def state(self) -> dict[str, float]:
        """For a checkpoint: the samples replaced so far, by source. Collective."""
        names = sorted(self._reader.progress(0))
        bad = self._context.sum([float(self._reader.faults.replaced[name]) for name in names])
        return {name: count + self._before.get(name, 0) for name, count in zip(names, bad, strict=True)}

    def counts(self) -> list[float]:
        """This rank's samples and bad samples, to be summed over ranks."""
        return [float(self._reader.faults.seen), float(self._reader.faults.bad)]

    def check(self, seen: float, bad: float) -> None:
        """`counts`, summed over ranks. Raises BadDataError on every rank where too many were bad: one that ended
        alone would leave the others waiting for it.
        """
        faults = self._reader.faults
        if faults.too_many(seen, bad):
            raise faults.error(seen, bad, self._context.gather(faults.worst()))

    def check_together(self) -> None:
        """Sum `counts` and check them. Collective."""
        self.check(*self._context.sum(self.counts()))

    def metrics(self, step: int) -> dict[str, float]:
        """By source, before `step`: samples given, epochs, and samples replaced. Collective.

        After a rollback, what was replaced beyond `step` before it counts already.
        """
        progress = self._reader.progress(step)
        bad = self._context.sum([float(self._reader.faults.replaced[source]) for source in progress])
        found: dict[str, float] = {}
        for (source, given), count in zip(progress.items(), bad, strict=True):
            found |= {f"data/{what}/{source}": value for what, value in given.items()}
            found[f"data/replaced/{source}"] = count + self._before.get(source, 0)
        return found


def replaced_before(state: Mapping[str, object] | None, run: Path, start: int) -> dict[str, float]:
    """What was replaced before step `start`, by source: from the checkpoint's state, or, of a checkpoint of an earlier
    version, from the events of the run.
    """
    if state is None:
        return {}
    kept = state.get("replaced")
    if isinstance(kept, Mapping):
        return {str(name): float(count) for name, count in kept.items()}
    return {name: float(count) for name, count in count_replaced(read_jsonl(run / EVENTS), start).items()}
