"""The image model and its classifier as one module: batch in, cross-entropy out, with mixup and CutMix."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from data_pipeline.reading import Targets
from data_pipeline.reading.batch import Batch, normalize
from pretrain.models import InternImage
from pretrain.models.randomness import drawing_from
from pretrain.objectives import losses
from pretrain.objectives.collectives import global_mean, summed
from pretrain.objectives.keys import StepKeys, sample_keys
from pretrain.objectives.metrics import Metrics
from pretrain.objectives.mixing import pairing
from pretrain.objectives.mixup import mix_pairs
from pretrain.tasks.module import BackboneLayout, LossOutput, TaskModule, TeacherTargets, image_text_of, layout_of


class ClassificationModule(TaskModule):
    """Whatever head the variant has: the category is predicted by `image(x)`."""

    def __init__(
        self,
        image: InternImage,
        mean: Sequence[float],
        std: Sequence[float],
        label_smoothing: float,
        mixup: float,
        cutmix: float,
    ) -> None:
        super().__init__()
        self.image, self.mean, self.std = image, tuple(mean), tuple(std)
        self.label_smoothing, self.mixup, self.cutmix = label_smoothing, mixup, cutmix

    def backbone(self) -> BackboneLayout:
        return layout_of(self.image, "image.")

    def classify(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> logits [B, classes]."""
        logits: Tensor = self.image(images)
        return logits

    def forward(
        self,
        batch: Batch[Targets],
        keys: StepKeys,
        teacher_targets: TeacherTargets | None = None,
        measure: bool = True,
    ) -> LossOutput:
        """Raises UserError where pairs are to be mixed and the local batch is odd."""
        metrics, keyed = Metrics(measure), sample_keys(keys, batch.positions)
        images = normalize(batch.views[:, 0], self.mean, self.std, next(self.image.parameters()).dtype)
        known = image_text_of(batch)
        labels, valid = known.labels, known.has_label
        share = None
        if self.training and (self.mixup > 0 or self.cutmix > 0):
            images, share = mix_pairs(images, keyed, self.mixup, self.cutmix)
        with drawing_from(keyed):
            logits = self.image(images)
        wanted = labels
        if share is not None:
            pi = pairing(len(labels), labels.device)
            own = F.one_hot(labels.clamp_min(0), logits.shape[-1])
            wanted = share[:, None] * own + (1 - share[:, None]) * own[pi]
            valid = valid & (known.has_label[pi] | (share == 1))
        values = losses.category_loss(logits, wanted, self.label_smoothing)
        count = summed(valid.sum())
        metrics.add("category/accuracy", lambda: global_mean((logits.argmax(1) == labels).float(), valid, count))
        loss = global_mean(values, valid, count)
        return LossOutput(loss, {"category": loss.detach()}, metrics.values)
