"""What a run was trained on, as its checkpoints keep it: class names, and which sets these were."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from data_pipeline.errors import first_ten
from data_pipeline.reading.storage.sources import SourceRecord
from pretrain.tasks.task import BatchReader


@dataclass(frozen=True)
class TrainedOn:
    """classes: of label 0, 1, ..., which are rows of a classifier; None where the sets name none."""

    epoch_samples: int
    fingerprint: str
    classes: tuple[str, ...] | None
    sources: tuple[SourceRecord, ...]

    @classmethod
    def of(cls, reader: BatchReader) -> Self:
        return cls(reader.epoch_samples, reader.fingerprint, reader.classes, reader.sources)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        classes = entry.get("classes")
        return cls(
            entry["epoch_samples"],
            entry["fingerprint"],
            None if classes is None else tuple(classes),
            tuple(SourceRecord(**source) for source in entry.get("sources", ())),
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def difference(self, now: "TrainedOn") -> str | None:
        """Why a run on this data cannot go on with `now`, in a sentence; None where it can. Sets may have moved."""
        if (self.epoch_samples, self.fingerprint) != (now.epoch_samples, now.fingerprint):
            return (
                f"was trained on {self.epoch_samples} samples an epoch; data.sources now hold {now.epoch_samples}, or "
                "other ones: the order would differ"
            )
        if self.classes != now.classes:
            return (
                "was trained on other class names, or on these in another order: a label would mean another class\n"
                f"  then ({len(self.classes or ())}): {first_ten(self.classes or ())}\n"
                f"  now ({len(now.classes or ())}): {first_ten(now.classes or ())}"
            )
        return None
