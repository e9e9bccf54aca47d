"""What the `task:` sections of dense tasks share. Imports no torch until a run needs it."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from data_pipeline.errors import UserError, first_ten
from data_pipeline.reading.config import DataConfig
from pretrain.configuration.schema import ModelConfig
from pretrain.tasks.task import BatchReader, Task

if TYPE_CHECKING:
    from pretrain.models import InternImage

Annotations = Literal["objects", "labels"]
_PACKED_BY = {"objects": "--coco INSTANCES.json", "labels": "--label-maps FOLDER"}


class DenseTask(Task):
    """annotations: what the packed pictures must have."""

    annotations: ClassVar[Annotations]

    frozen_stages: int = Field(0, ge=0, le=4, description="1: the stem and the first stage keep their weights; ...")

    def planned_side(self, data: DataConfig) -> int:
        if data.rectangle is None:
            return data.image_size
        factor, rectangle = data.rectangle.scale[1], data.rectangle
        sides = [min(side * factor, data.image_size) for side in (max(rectangle.shorter), rectangle.longer)]
        area = math.prod(math.ceil(side / 32) * 32 for side in sides)
        return math.ceil(math.sqrt(area) / 32) * 32

    def check_reader(self, reader: BatchReader) -> None:
        lacking = [source.name for source in reader.sources if source.about.get("annotations") != self.annotations]
        if lacking:
            raise UserError(
                f"task {self.name} learns from {self.annotations}, which these sets do not have: {first_ten(lacking)}; "
                f"pack them with `internimage shards pack IMAGES OUTPUT {_PACKED_BY[self.annotations]}`"
            )

    def annotations_refusal(self, data: Path | str) -> str | None:
        """Why the set in `data` cannot be scored; None where it has the annotations that this task needs."""
        from data_pipeline.format import open_set

        if open_set(data).about.get("annotations") == self.annotations:
            return None
        return f"{data} has no {self.annotations}: pack it with {_PACKED_BY[self.annotations]}"

    def image_model(self, model: ModelConfig) -> "InternImage":
        """The image model of the configuration, without a classifier of its own."""
        from pretrain.models import create_model

        image = create_model(model.name, num_classes=0, **model.overrides)
        if model.recompute == "blocks":
            image.set_grad_checkpointing(True)
        return image

    def rows_for(self, model: ModelConfig, data: DataConfig, classes: int) -> int:
        """Classes of the heads. Raises UserError where none are known, or the views are no rectangles."""
        from pretrain.tasks.module import classes_for

        if data.rectangle is None:
            raise UserError(
                f"task {self.name} needs views that keep the picture's shape: give data.rectangle "
                "(see configs/mask_rcnn_1x_coco.yaml)"
            )
        rows = classes_for(model, classes)
        if not rows:
            raise UserError(f"task {self.name} needs classes: set model.num_classes, or use sets that name them")
        return rows
