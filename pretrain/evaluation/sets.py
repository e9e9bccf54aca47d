"""What an evaluation says about its set."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.format import open_set


@dataclass(frozen=True)
class AboutSet:
    folder: Path
    name: str
    samples: int
    classes: tuple[str, ...] | None
    credit: dict[str, str]  # {"attribution": ...} where the set's manifest gives one

    def class_names(self) -> tuple[str, ...]:
        """Raises UserError where the set has no labels."""
        if not self.classes:
            raise UserError(f"{self.folder}: its manifest names no classes, so it cannot be classified")
        return self.classes


def describe(set_folder: Path | str) -> AboutSet:
    """Raises UserError where there is no set, or an empty one."""
    manifest = open_set(set_folder)
    if not manifest.samples:
        raise UserError(f"{manifest.folder}: the set is empty")
    attribution = manifest.about.get("attribution")
    credit = {"attribution": str(attribution)} if attribution else {}
    return AboutSet(manifest.folder, manifest.name, manifest.samples, manifest.classes, credit)
