"""What an evaluation says about its set, and which classes the model was trained on."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.format import open_set, read_manifest
from data_pipeline.format.manifest import SET_MANIFEST
from data_pipeline.reading.storage.sources import merge_classes
from pretrain.configuration.schema import RunConfig


@dataclass(frozen=True)
class AboutSet:
    """classes: as the manifest names them, for prompts. distinct: the same with equal names told apart, for labels."""

    folder: Path
    name: str
    samples: int
    classes: tuple[str, ...] | None
    distinct: tuple[str, ...] | None
    credit: dict[str, str]  # {"attribution": ...} where the set's manifest gives one

    def class_names(self) -> tuple[str, ...]:
        """Raises UserError where the set has no labels."""
        if not self.classes:
            raise UserError(f"{self.folder}: its manifest names no classes, so it cannot be classified")
        return self.classes


def describe_set(set_folder: Path | str) -> AboutSet:
    """Raises UserError where there is no set, or an empty one."""
    manifest = open_set(set_folder)
    if not manifest.samples:
        raise UserError(f"{manifest.folder}: the set is empty")
    attribution = manifest.about.get("attribution")
    credit = {"attribution": str(attribution)} if attribution else {}
    distinct = merge_classes([manifest.classes])[0]
    return AboutSet(manifest.folder, manifest.name, manifest.samples, manifest.classes, distinct, credit)


def trained_classes(config: RunConfig) -> tuple[str, ...] | None:
    """Names of the classifier's rows: the classes of the run's sources, joined as its reader joined them.

    None where a source is not here any more (another machine), is remote, or names no classes.
    """
    sources = config.data.sources
    if not all((Path(source.path) / SET_MANIFEST).is_file() for source in sources):
        return None
    return merge_classes([read_manifest(source.path).classes if source.labels else None for source in sources])[0]
