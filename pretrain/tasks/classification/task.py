"""The `task:` section of classification, and what a run asks of it. Imports no torch until a run needs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.reading.config import DataConfig
from pretrain.configuration.schema import ModelConfig, RunConfig
from pretrain.tasks.task import BatchReader, MainScore, Prediction, Task

if TYPE_CHECKING:
    from pretrain.tasks.classification.module import ClassificationModule
    from pretrain.tasks.module import TaskModule


SHOWN = 5  # classes of a predicted picture


class Classification(Task):
    evaluations: ClassVar[tuple[str, ...]] = ("top1",)
    main_score: ClassVar[MainScore | None] = MainScore("top1", "top1", "top-1 accuracy")

    name: str = "classification"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0, description="alpha of Beta(alpha, alpha); 0: off")
    cutmix: float = Field(0.0, ge=0, description="alpha of Beta(alpha, alpha); 0: off")

    def build(self, model: ModelConfig, data: DataConfig, *, classes: int) -> "ClassificationModule":
        from pretrain.models import create_model
        from pretrain.tasks.classification.module import ClassificationModule
        from pretrain.tasks.module import classes_for

        rows = classes_for(model, classes)
        if not rows:
            raise UserError("task classification needs classes: set model.num_classes, or use labelled data")
        image = create_model(model.name, num_classes=rows, **model.overrides)
        if model.recompute != "none":
            image.set_grad_checkpointing(True)
        return ClassificationModule(image, data.mean, data.std, self.label_smoothing, self.mixup, self.cutmix)

    def check_reader(self, reader: BatchReader) -> None:
        if not reader.has_labels():
            raise UserError(
                "task classification: no sample of data.sources has a label, so nothing can be learned; name sets with "
                "labels, and look at data.sources.N.labels"
            )

    def refusal(
        self, name: str, module: "TaskModule", data: Path | str, *, classes: Sequence[str] | None
    ) -> str | None:
        from pretrain.evaluation.classification import top1_refusal

        return top1_refusal(_own(module).image.num_classes, data, classes)

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
        from pretrain.evaluation.classification import top1

        return top1(_own(module), data, run, classes=classes, batch_size=batch_size)

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
        """The five best classes; the best one is drawn in any case, the others from `least` on."""
        from data_pipeline.reading.decode.pixels import decode, read_header
        from pretrain.evaluation.classification import classify_picture
        from pretrain.evaluation.dense.drawing import drawn_classes
        from pretrain.tasks.class_names import row_names

        chances = classify_picture(_own(module), image, run)
        names, ids = row_names(classes, len(chances)) or (), dict(enumerate(categories))
        scores, rows = chances.topk(min(SHOWN, len(chances)))
        best = list(zip(rows.tolist(), scores.tolist(), strict=True))
        results = [{"image_id": image_id, "category_id": ids.get(row, row + 1), "score": score} for row, score in best]
        shown = [best[0], *(one for one in best[1:] if one[1] >= least)]
        named = [(names[row] if row < len(names) else str(row), score) for row, score in shown]
        return Prediction(drawn_classes(decode(image, read_header(image, run.data.max_pixels)), named), results)


def _own(module: "TaskModule") -> "ClassificationModule":
    from pretrain.tasks.classification.module import ClassificationModule

    assert isinstance(module, ClassificationModule), "a task is given the modules that it built"
    return module
