"""What an evaluation says about its set, and which rows of a classifier the set's labels mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.format import open_set, packed_rows, read_sidecar
from data_pipeline.reading.storage.sources import merge_classes
from pretrain.evaluation.pictures import is_picture_folder, list_pictures
from pretrain.tasks.class_names import rows_by_name


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

    def rows_in(self, names: Sequence[str]) -> Tensor:
        """int64 [classes + 1]: the place in `names` of each class of this set, and -1, which label -1 reads.

        Raises UserError where either side has no names, and one with both lists where `names` lacks a class.
        """
        self.class_names()
        if not names:
            raise UserError(
                "the checkpoint names no classes, so its classifier's rows cannot be told apart: give their names, "
                "one a line in the order of the rows (--classes FILE)"
            )
        rows = rows_by_name(names, self.distinct or (), have="the model", want=str(self.folder))
        return torch.cat([rows, torch.tensor([-1])])


def describe_set(set_folder: Path | str) -> AboutSet:
    """Of a shard set, or of a folder of pictures. Raises UserError where there is neither, or nothing in it."""
    if is_picture_folder(set_folder):
        found = list_pictures(set_folder)
        return AboutSet(found.folder, found.folder.name, len(found.pictures), found.classes, found.classes, {})
    manifest = open_set(set_folder)
    if not manifest.samples:
        raise UserError(f"{manifest.folder}: the set is empty")
    attribution = manifest.about.get("attribution")
    credit = {"attribution": str(attribution)} if attribution else {}
    distinct = merge_classes([manifest.classes])[0]
    return AboutSet(manifest.folder, manifest.name, manifest.samples, manifest.classes, distinct, credit)


def captions_refusal(set_folder: Path | str) -> str | None:
    """Why nothing can be retrieved from the set; None where a sample of it has a caption."""
    if is_picture_folder(set_folder):
        found = any(picture.caption for picture in list_pictures(set_folder).pictures)
    else:
        manifest = open_set(set_folder)
        sidecars = (read_sidecar(manifest.sidecar_path(entry), ["status", "caption"]) for entry in manifest.shards)
        found = any(any(packed_rows(rows)["caption"].to_pylist()) for rows in sidecars)
    return None if found else f"no sample of {set_folder} has a caption"


def classes_refusal(set_folder: Path | str, names: Sequence[str] | None) -> str | None:
    """Why a model of the classes `names` cannot be scored on the set; None where it can."""
    try:
        describe_set(set_folder).rows_in(names or ())
    except UserError as error:
        return str(error)
    return None
