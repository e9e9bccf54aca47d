"""The `task:` sections of segmentation, and what a run asks of them. Imports no torch until a run needs it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from data_pipeline.reading.config import DataConfig, Section
from pretrain.configuration.schema import ModelConfig, RunConfig
from pretrain.tasks.dense.section import Annotations, DenseTask
from pretrain.tasks.detection.task import ObjectTask
from pretrain.tasks.task import MainScore, Prediction

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.reading import Targets, TargetSpec
    from pretrain.evaluation.dense.label_maps import Segmenter, Windows
    from pretrain.evaluation.dense.views import Looks
    from pretrain.tasks.module import TaskModule
    from pretrain.tasks.segmentation.pyramid import PyramidModule
    from pretrain.tasks.segmentation.queries import QueryModule


class SlideConfig(Section):
    """Sliding windows of the evaluation; scores of overlapping ones are averaged."""

    side: int = Field(512, ge=32, description="of a window, pixels of the resized picture")
    step: int = Field(341, ge=1, description="from window to window, pixels")


class LooksConfig(Section):
    """How a picture is looked at where it is scored or predicted."""

    scales: list[float] = Field([1.0], min_length=1, description="factors of the resized picture, scores summed")
    flip: bool = Field(False, description="mirrored as well")
    slide: SlideConfig | None = Field(None, description="in windows, where the picture is larger than one")

    def look(self) -> "Looks":
        from pretrain.evaluation.dense.views import Looks

        return Looks(tuple(self.scales), self.flip)

    def windows(self) -> "Windows | None":
        from pretrain.evaluation.dense.label_maps import Windows

        return None if self.slide is None else Windows(self.slide.side, self.slide.step)


class MapTask(DenseTask):
    """What learns from label maps, gives every pixel a class and is scored by mIoU."""

    evaluations: ClassVar[tuple[str, ...]] = ("label_maps",)
    main_score: ClassVar[MainScore | None] = MainScore("label_maps", "mIoU", "mIoU")
    annotations: ClassVar[Annotations] = "labels"

    test: LooksConfig = LooksConfig()

    def target_spec(self, data: DataConfig) -> "TargetSpec[Targets]":
        from data_pipeline.reading.dense import LabelMaps

        return LabelMaps(data.image_size)

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
        return {"task": name} | evaluate_maps(segmenter(module), data, run, self.test, classes)

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
        return predict_map(segmenter(module), image, run, self.test)


class Semantic(MapTask):
    """UperNet."""

    name: str = "semantic"
    width: int = Field(512, ge=8, description="channels of the head")
    auxiliary_width: int = Field(256, ge=8, description="channels of the second head, on the third stage")
    auxiliary_weight: float = Field(0.4, ge=0, description="of the second head's loss; 0: no second head")

    def build(self, model: ModelConfig, data: DataConfig, *, classes: int) -> "PyramidModule":
        from pretrain.tasks.segmentation.pyramid import PyramidModule

        return PyramidModule(
            self.image_model(model),
            data.mean,
            data.std,
            classes=self.rows_for(model, data, classes),
            width=self.width,
            auxiliary_width=self.auxiliary_width,
            auxiliary_weight=self.auxiliary_weight,
            frozen_stages=self.frozen_stages,
        )

    def classes_of(self, weights: "Mapping[str, Tensor]") -> int:
        return len(weights["head.classifier.weight"])


class Mask2FormerSettings(Section):
    """Keys that both of Mask2Former's tasks have, with the published values."""

    width: int = Field(256, ge=8, description="of queries and maps")
    hidden: int = Field(2048, ge=8, description="of the decoder layers' feed-forward parts")
    encoder_hidden: int = Field(1024, ge=8, description="of the pixel decoder's")
    heads: int = Field(8, ge=1)
    queries: int = Field(100, ge=1)
    encoder_layers: int = Field(6, ge=1)
    decoder_layers: int = Field(9, ge=1, description="beside the first prediction, made before them")
    points: int = Field(12544, ge=1, description="of a mask at which it is compared with its target")

    def of_transformers(self) -> dict[str, Any]:
        return {
            "feature_size": self.width,
            "mask_feature_size": self.width,
            "hidden_dim": self.width,
            "encoder_feedforward_dim": self.encoder_hidden,
            "dim_feedforward": self.hidden,
            "num_attention_heads": self.heads,
            "num_queries": self.queries,
            "encoder_layers": self.encoder_layers,
            "decoder_layers": self.decoder_layers + 1,  # transformers counts the first prediction
            "train_num_points": self.points,
        }


class QuerySegmentation(MapTask):
    """Mask2Former on label maps."""

    name: str = "query_segmentation"
    mask2former: Mask2FormerSettings = Mask2FormerSettings()

    def build(self, model: ModelConfig, data: DataConfig, *, classes: int) -> "QueryModule":
        return _query_module(self, self.mask2former, model, data, classes)

    def classes_of(self, weights: "Mapping[str, Tensor]") -> int:
        return len(weights["net.class_predictor.weight"]) - 1


class QueryInstance(ObjectTask):
    """Mask2Former on objects."""

    main_score: ClassVar[MainScore | None] = MainScore("objects", "mask_AP", "mask AP")
    masks: ClassVar[bool] = True

    name: str = "query_instance"
    mask2former: Mask2FormerSettings = Mask2FormerSettings()

    def build(self, model: ModelConfig, data: DataConfig, *, classes: int) -> "QueryModule":
        return _query_module(self, self.mask2former, model, data, classes)

    def classes_of(self, weights: "Mapping[str, Tensor]") -> int:
        return len(weights["net.class_predictor.weight"]) - 1


def _query_module(
    task: DenseTask, settings: Mask2FormerSettings, model: ModelConfig, data: DataConfig, classes: int
) -> "QueryModule":
    from pretrain.tasks.segmentation.queries import QueryModule

    return QueryModule(
        task.image_model(model),
        data.mean,
        data.std,
        classes=task.rows_for(model, data, classes),
        settings=settings.of_transformers(),
        frozen_stages=task.frozen_stages,
    )


def evaluate_maps(
    module: "Segmenter", data: Path | str, run: RunConfig, test: LooksConfig, classes: Sequence[str] | None
) -> dict[str, Any]:
    """`Task.evaluate` of a module that gives every pixel a class."""
    from pretrain.evaluation.dense.label_maps import score_label_maps

    return score_label_maps(module, data, run, classes=classes, look=test.look(), slide=test.windows())


def predict_map(module: "Segmenter", image: bytes, run: RunConfig, test: LooksConfig) -> Prediction:
    """`Task.predict` of a module that gives every pixel a class."""
    from data_pipeline.reading.decode.pixels import decode, read_header
    from pretrain.evaluation.dense.drawing import drawn_map
    from pretrain.evaluation.dense.label_maps import segment

    pixels = decode(image, read_header(image, run.data.max_pixels))
    labels = segment(module, pixels, run.data, look=test.look(), slide=test.windows())
    return Prediction(drawn_map(pixels, labels), [], labels)


def segmenter(module: "TaskModule") -> "Segmenter":
    """The module as one that gives every pixel a class."""
    from pretrain.tasks.dense.module import DenseModule

    assert isinstance(module, DenseModule) and hasattr(module, "class_scores"), (
        "a task is given the modules that it built"
    )
    return module  # type: ignore[return-value]
