"""A task outside the package: a line from a picture's mean red and green to its mean blue."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data_pipeline.reading import Batch, DataConfig, ImageText, Targets, evaluation_batches
from pretrain.configuration import RunConfig
from pretrain.configuration.schema import ModelConfig
from pretrain.evaluation.results import score
from pretrain.tasks.module import LossOutput, StepKeys, TaskModule, TeacherTargets
from pretrain.tasks.task import MainScore, Task


class ToyModule(TaskModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.line = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))

    def errors(self, views: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> [B]."""
        colour = views.float().mean((1, 2)) / 255
        return (self.line(colour[:, :2])[:, 0] - colour[:, 2]).square()

    def forward(
        self,
        batch: Batch[Targets],
        keys: StepKeys,
        teacher_targets: TeacherTargets | None = None,
        measure: bool = True,
    ) -> LossOutput:
        loss = self.errors(batch.views[:, 0]).mean()
        return LossOutput(loss, {"blue": loss.detach()}, {})


class Toy(Task):
    evaluations: ClassVar[tuple[str, ...]] = ("blue",)
    main_score: ClassVar[MainScore | None] = MainScore("blue", "closeness", "closeness of blue")
    width: int = 4

    def build(self, model: ModelConfig, data: DataConfig, *, classes: int) -> ToyModule:
        return ToyModule(self.width)

    def evaluate(
        self,
        name: str,
        module: TaskModule,
        data: Path | str,
        run: RunConfig,
        *,
        classes: Sequence[str] | None,
        batch_size: int,
    ) -> dict[str, Any]:
        assert isinstance(module, ToyModule)
        batches = evaluation_batches(data, run.data.image_size, batch_size, ImageText())
        errors = torch.cat([module.errors(batch.views[:, 0]).detach() for batch in batches])
        closeness = 1 - errors.mean().clamp(0, 1).item()
        scores = [score("closeness", "closeness of blue", closeness, chance=0.0, count=len(errors), beside={})]
        return {"task": name, "title": "Toy", "set": Path(data).name, "samples": len(errors), "scores": scores}
