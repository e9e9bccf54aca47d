"""The module that a task builds: all that is trained hangs below it, its forward pass gives the loss."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.reading import Batch, ImageTextTargets, Targets
from pretrain.configuration.schema import ModelConfig
from pretrain.models import InternImage
from pretrain.models.recomputation import values_within
from pretrain.objectives.keys import StepKeys

__all__ = [
    "BackboneLayout",
    "LossOutput",
    "StepKeys",
    "TaskModule",
    "TeacherTargets",
    "classes_for",
    "image_of",
    "image_text_of",
    "layout_of",
]
TeacherTargets = dict[str, Tensor]  # what the teacher says of a micro-batch, by loss


class LossOutput(NamedTuple):
    """total: scalar whose mean over ranks is the loss of the joined micro-batch (back-propagate this). parts: each
    unweighted loss, same convention, detached. metrics: diagnostics, to be averaged over ranks; read them after the
    backward pass, which adds the gradient norms.
    """

    total: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class BackboneLayout:
    """How the parameters of a module's image model are named, for layer-wise decay.

    prefix: of all its names, as "image.". depths: blocks of its four stages. post_norm_blocks: in the third stage, the
    block that post_norms.J follows.
    """

    prefix: str
    depths: tuple[int, ...]
    post_norm_blocks: tuple[int, ...] = ()


class TaskModule(nn.Module):
    """Base of every module that training optimises. `forward` is the one method that must be written.

    Parameters have at least one dimension (DeepSpeed), and their values are drawn from torch's generator alone.
    """

    def forward(
        self,
        batch: Batch[Targets],
        keys: StepKeys,
        teacher_targets: TeacherTargets | None = None,
        measure: bool = True,
    ) -> LossOutput:
        """The loss of one micro-batch.

        keys: what randomness is derived from, with batch.positions. teacher_targets: from the method of that name, None
        without a teacher. measure: also compute diagnostics, which training asks for on the steps that it logs.
        """
        raise NotImplementedError

    def begin(self) -> None:
        """Called once on the whole module before a run's first step, not when it resumes: loads what the settings
        name. Raises UserError where that is missing or does not fit.
        """

    def backbone(self) -> BackboneLayout | None:
        """The image model's names; None where the module has none, and then every layer learns at the full lr."""
        return None

    def recompute_within(self, gigabytes: float, image_size: int, *, rows: int, width: int) -> None:
        """Recompute in the image model only what does not fit into the budget; elsewhere blocks. rows: images at once.
        width: bytes of a value. Raises UserError where the budget is too small, or where there is no image model.
        """
        image = image_of(self)
        budget = values_within(gigabytes, image.arguments, image_size, rows=rows, width=width)
        image.recompute_within(budget, image_size)

    def loss_weights(self) -> dict[str, float]:
        """The weight of each part of the loss in the total; a part that is not named counts whole."""
        return {}

    def head_costs(self, side: int) -> tuple[float, float]:
        """For a plan: values of 4 bytes that everything but the image model keeps of one picture of `side` x `side` for
        the backward pass, and its multiply-adds; (0, 0) where that is little, or where the plan counts it itself.
        """
        return 0.0, 0.0

    def notices(self) -> list[str]:
        """What a user should know before the first step, one sentence each, as a loss that the data switch off."""
        return []

    def alarms(self, metrics: dict[str, float]) -> list[str]:
        """Signs of a collapse in logged metrics averaged over ranks, one sentence each."""
        return []

    def teacher(self) -> nn.Module | None:
        """A fresh copy of the parts that are averaged over steps, in eval mode and without gradients; None where no
        loss learns from a teacher. Parameters that are partitioned at the time (ZeRO-3) are left for training to fill.
        """
        return None

    def teacher_names(self) -> list[str]:
        """The teacher's parameters, as this module's `state_dict()` names them too."""
        return []

    def teacher_targets(self, teacher: nn.Module, batch: Batch[Targets], keys: StepKeys) -> TeacherTargets:
        """What the teacher gives `forward` for this micro-batch, without gradients."""
        raise NotImplementedError


def image_text_of(batch: Batch[Targets]) -> ImageTextTargets:
    """The captions and labels of a batch that a reader of such targets made."""
    assert isinstance(batch.targets, ImageTextTargets), "a task's module is given batches with the task's own targets"
    return batch.targets


def image_of(module: nn.Module) -> InternImage:
    """The image model, which hand-off exports. Raises UserError where the module has none under the name `image`."""
    image = dict(module.named_children()).get("image")
    if not isinstance(image, InternImage):
        raise UserError("this task trains no InternImage under the name 'image', so none can be planned or exported")
    return image


def layout_of(image: InternImage, prefix: str) -> BackboneLayout:
    """The layout of an InternImage whose names begin with `prefix`."""
    return BackboneLayout(prefix, tuple(image.depths), tuple(image.stages[2].post_norm_after))


def classes_for(model: ModelConfig, classes: int) -> int:
    """Rows of the classifier: model.num_classes, or else the classes of the data.

    Raises UserError where the model has fewer rows than the data have classes.
    """
    if 0 < model.num_classes < classes:
        raise UserError(
            f"model.num_classes is {model.num_classes}, but the data name {classes} classes: raise it, or set 0 to "
            "take theirs"
        )
    return model.num_classes or classes
