"""The `task:` sections of detection, and what a run asks of them. Imports no torch until a run needs it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from data_pipeline.reading.config import DataConfig
from pretrain.configuration.schema import ModelConfig, RunConfig
from pretrain.tasks.dense.section import Annotations, DenseTask
from pretrain.tasks.task import MainScore, Prediction

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.reading import Targets, TargetSpec
    from pretrain.evaluation.dense.objects import Detector
    from pretrain.tasks.detection.queries import QueryDetector
    from pretrain.tasks.detection.regions import RegionModule
    from pretrain.tasks.module import TaskModule


class ObjectTask(DenseTask):
    """What learns from objects, finds them and is scored by average precision."""

    evaluations: ClassVar[tuple[str, ...]] = ("objects",)
    main_score: ClassVar[MainScore | None] = MainScore("objects", "box_AP", "box AP")
    annotations: ClassVar[Annotations] = "objects"
    masks: ClassVar[bool] = False

    def target_spec(self, data: DataConfig) -> "TargetSpec[Targets]":
        from data_pipeline.reading.dense import Objects

        return Objects(masks=self.masks)

    def refusal(
        self, name: str, module: "TaskModule", data: Path | str, *, classes: Sequence[str] | None
    ) -> str | None:
        from pretrain.evaluation.sets import classes_refusal

        return self.annotations_refusal(data) or classes_refusal(data, classes)

    def evaluate(
        self,
        name: str,
        module: "TaskModule",
        data: Path | str,
        run: RunConfig,
        *,
        classes: Sequence[str] | None,
        batch_size: int,
    ) -> dict[str, Any]:
        from pretrain.evaluation.dense.objects import score_objects

        return {"task": name} | score_objects(finder(module), data, run, classes=classes, masks=self.masks)

    def predict(
        self,
        module: "TaskModule",
        image: bytes,
        run: RunConfig,
        *,
        classes: Sequence[str],
        image_id: int,
        categories: Sequence[int],
        least: float,
    ) -> Prediction:
        return predict_objects(
            finder(module), image, run, classes=classes, image_id=image_id, categories=categories, least=least
        )


class Detection(ObjectTask):
    """Faster R-CNN."""

    name: str = "detection"
    width: int = Field(256, ge=8, description="channels of the feature pyramid")
    hidden: int = Field(1024, ge=8, description="width of the box head")
    anchors: tuple[int, int, int, int, int] = Field(
        (32, 64, 128, 256, 512), description="side of the anchors of each level, strides 4 to 64, pixels"
    )

    def build(self, model: ModelConfig, data: DataConfig, *, classes: int) -> "RegionModule":
        from pretrain.tasks.detection.heads import HeadSizes
        from pretrain.tasks.detection.regions import RegionModule

        return RegionModule(
            self.image_model(model),
            data.mean,
            data.std,
            classes=self.rows_for(model, data, classes),
            masks=self.masks,
            sizes=HeadSizes(self.width, self.hidden, self.anchors),
            frozen_stages=self.frozen_stages,
        )

    def classes_of(self, weights: "Mapping[str, Tensor]") -> int:
        return len(weights["roi_heads.box_predictor.cls_score.weight"]) - 1


class Instance(Detection):
    """Mask R-CNN."""

    main_score: ClassVar[MainScore | None] = MainScore("objects", "mask_AP", "mask AP")
    masks: ClassVar[bool] = True

    name: str = "instance"


class QueryDetection(ObjectTask):
    """Deformable DETR."""

    name: str = "query_detection"
    width: int = Field(256, ge=8, description="of queries and maps")
    hidden: int = Field(1024, ge=8, description="of the layers' feed-forward parts")
    heads: int = Field(8, ge=1)
    queries: int = Field(300, ge=1)
    encoder_layers: int = Field(6, ge=1)
    decoder_layers: int = Field(6, ge=2)

    def build(self, model: ModelConfig, data: DataConfig, *, classes: int) -> "QueryDetector":
        from pretrain.tasks.detection.queries import QueryDetector

        return QueryDetector(
            self.image_model(model),
            data.mean,
            data.std,
            classes=self.rows_for(model, data, classes),
            settings={
                "d_model": self.width,
                "encoder_ffn_dim": self.hidden,
                "decoder_ffn_dim": self.hidden,
                "encoder_attention_heads": self.heads,
                "decoder_attention_heads": self.heads,
                "encoder_layers": self.encoder_layers,
                "decoder_layers": self.decoder_layers,
                "num_queries": self.queries,
                "two_stage_num_proposals": self.queries,
            },
            frozen_stages=self.frozen_stages,
        )

    def classes_of(self, weights: "Mapping[str, Tensor]") -> int:
        return len(weights["net.decoder.class_embed.0.weight"])


def predict_objects(
    module: "Detector",
    image: bytes,
    run: RunConfig,
    *,
    classes: Sequence[str],
    image_id: int,
    categories: Sequence[int],
    least: float,
) -> Prediction:
    """`Task.predict` of a module that finds objects."""
    from data_pipeline.reading.decode.pixels import decode, read_header
    from pretrain.evaluation.dense.drawing import drawn_objects
    from pretrain.evaluation.dense.objects import as_detections, find_objects

    pixels = decode(image, read_header(image, run.data.max_pixels))
    found = find_objects(module, pixels, run.data)
    category = dict(enumerate(categories))
    results = list(as_detections(found, image_id, category, masks=found.masks is not None))
    return Prediction(drawn_objects(pixels, found, classes, least), results)


def finder(module: "TaskModule") -> "Detector":
    """The module as one that finds objects."""
    from pretrain.tasks.dense.module import DenseModule

    assert isinstance(module, DenseModule) and hasattr(module, "instances"), "a task is given the modules that it built"
    return module  # type: ignore[return-value]
