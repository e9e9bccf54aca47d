"""The `task:` section of classification, and what a run asks of it. Imports no torch until a run needs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.reading.config import DataConfig
from pretrain.configuration.schema import ModelConfig, RunConfig
from pretrain.tasks.task import BatchReader, MainScore, Task

if TYPE_CHECKING:
    from pretrain.tasks.classification.module import ClassificationModule
    from pretrain.tasks.module import TaskModule


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


def _own(module: "TaskModule") -> "ClassificationModule":
    from pretrain.tasks.classification.module import ClassificationModule

    assert isinstance(module, ClassificationModule), "a task is given the modules that it built"
    return module
