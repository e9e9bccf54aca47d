"""Image-text pretraining as one module: batch in, loss out. All that is trained hangs below it; the teacher is a copy.

batch --mix/mask--> image --fused map F--+-- projector, predictor ---- dense loss ----- teacher(view 1 or 2)
                                         +-- attention pool -- g --+-- InfoNCE -------- text(tokens)
                                                                   +-- fc_norm, head -- labels
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.reading import ImageTextTargets, Targets
from data_pipeline.reading.batch import Batch, normalize
from data_pipeline.reading.config import DataConfig
from pretrain.models import InternImage
from pretrain.models.randomness import drawing_from
from pretrain.objectives import losses
from pretrain.objectives.collectives import gather_rows, global_mean, summed
from pretrain.objectives.contrastive import info_nce, text_loss
from pretrain.objectives.decoder import Blocks
from pretrain.objectives.keys import StepKeys, sample_keys
from pretrain.objectives.metrics import Metrics, collapse_alarms
from pretrain.objectives.mixing import TOKEN, Cells, cell_size, draw_cells, mix, partners
from pretrain.objectives.position import identity_parameters, relative_parameters
from pretrain.tasks.module import BackboneLayout, LossOutput, TaskModule, TeacherTargets, image_text_of, layout_of
from pretrain.tasks.pretraining.recipes import MOCO_TEMPERATURE, RECIPES, DenseTarget
from pretrain.tasks.pretraining.teacher import Teacher, TeacherRecipe

if TYPE_CHECKING:
    from pretrain.tasks.pretraining.task import Pretraining

PATIENCE = 3  # measurements in a row that an alarm needs


class Source(NamedTuple):
    """The tokens of the fused map that belong to one image of each row. owner: int64 [B], that image's row; an
    involution.
    """

    tokens: Tensor
    owner: Tensor


class PretrainingModule(TaskModule):
    """One preset over one InternImage. Built by `build_pretraining`.

    Parts that a preset does without are absent. `weights` holds the losses that are on.
    """

    image: InternImage
    text: nn.Module
    logit_scale: nn.Module
    projector: nn.Module
    predictor: nn.Module
    pooled_projector: nn.Module
    pooled_predictor: nn.Module
    pixel_head: nn.Module

    def __init__(
        self,
        settings: "Pretraining",
        data: DataConfig,
        weights: dict[str, float],
        parts: dict[str, nn.Module],
        teacher: TeacherRecipe | None,
        notices: Sequence[str],
    ) -> None:
        super().__init__()
        self.settings, self.weights, self.recipe = settings, weights, RECIPES[settings.preset]
        self.image_size, self.mean, self.std = data.image_size, data.mean, data.std
        self.cell = 0 if self.recipe.image == "view" else cell_size(data.image_size, settings.mask_cell)
        self.decorrelation = settings.decorrelation if self.recipe.decorrelated else 0.0
        self.dense_targets = tuple(d for d in self.recipe.dense if d.name in weights)
        self.has_text = "text" in parts
        self._teacher, self._notices = teacher, list(notices)
        self._suspected: dict[str, int] = {}
        for name, part in parts.items():
            self.add_module(name, part)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks of every Transformer and of the image encoder in the backward pass."""
        self.image.set_grad_checkpointing(enable)
        if self.has_text:
            self.text.set_grad_checkpointing(enable)  # type: ignore[operator]  # of open_clip's tower
        for part in self.modules():
            if isinstance(part, Blocks):
                part.checkpointing = enable

    # -- what training calls

    def backbone(self) -> BackboneLayout:
        return layout_of(self.image, "image.")

    def loss_weights(self) -> dict[str, float]:
        return self.weights

    def notices(self) -> list[str]:
        return self._notices

    def teacher(self) -> Teacher | None:
        return None if self._teacher is None else self._teacher.build(self)

    def teacher_names(self) -> list[str]:
        averaged = () if self._teacher is None else self._teacher.averaged
        return [name for name, _ in self.named_parameters() if name.startswith(averaged)]

    @torch.no_grad()
    def teacher_targets(self, teacher: nn.Module, batch: Batch[Targets], keys: StepKeys) -> TeacherTargets:
        """The teacher's outputs for this micro-batch, all views in one pass: LN(tokens) [B, N, D] a dense target, unit
        vectors [B, D] for pooled ones. Row i of a mixed input's second target is that of its second image.
        """
        names: list[str] = [d.name for d in self.dense_targets] or ["pooled"]
        if self.dense_targets:
            views = [batch.views[:, d.view] for d in self.dense_targets]
        else:
            views = [batch.views[:, 1 - self.recipe.view]]
        if self.recipe.image == "mixed" and "inter" in names:
            at = names.index("inter")
            views[at] = views[at][partners(batch.positions, keys, self.settings.mix_probability)]
        dtype = next(teacher.parameters()).dtype
        out = teacher(normalize(torch.cat(views), self.mean, self.std, dtype))
        return dict(zip(names, out.chunk(len(names)), strict=True))

    def forward(
        self,
        batch: Batch[Targets],
        keys: StepKeys,
        teacher_targets: TeacherTargets | None = None,
        measure: bool = True,
    ) -> LossOutput:
        """Raises UserError where an objective that mixes pairs is given an odd local batch."""
        metrics = Metrics(measure)
        parts = self._losses(batch, keys, teacher_targets or {}, metrics)
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return LossOutput(total, {name: part.detach() for name, part in parts.items()}, metrics.values)

    def alarms(self, metrics: dict[str, float]) -> list[str]:
        """Signs of collapse that `PATIENCE` calls in a row agree on (objectives/metrics.py)."""
        found = collapse_alarms(metrics, self.settings.decoder.dim, self.decorrelation)
        self._suspected = {kind: self._suspected.get(kind, 0) + 1 for kind in found}
        return [message for kind, message in found.items() if self._suspected[kind] >= PATIENCE]

    # -- what evaluation calls

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> unit vectors [B, embed_dim]."""
        if not self.image.use_clip_projector:
            raise UserError("encode_image: this model has no pooled vector that meets the text (use_clip_projector)")
        fused = self.image.forward_fused(images)
        return losses.unit(self.image.clip_projector(fused.flatten(1, 2)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, L] -> unit vectors [B, embed_dim]."""
        if not self.has_text:
            raise UserError("encode_text: this model has no text tower; choose a task.preset with one (m3i, clip)")
        return losses.unit(self.text(tokens))

    def classify(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> logits [B, classes]."""
        logits: Tensor = self.image(images)
        return logits

    # -- the losses

    def _on(self, name: str) -> bool:
        return name in self.weights

    def _normalized(self, views: Tensor) -> Tensor:
        return normalize(views, self.mean, self.std, next(self.image.parameters()).dtype)

    def _losses(
        self, batch: Batch[Targets], keys: StepKeys, targets: TeacherTargets, metrics: Metrics
    ) -> dict[str, Tensor]:
        recipe, rows, known = self.recipe, len(batch.positions), image_text_of(batch)
        device = batch.views.device
        own = torch.arange(rows, device=device)
        grid = self.image_size // TOKEN
        first = batch.views[:, recipe.view]
        every = torch.arange(grid * grid, device=device)
        cells = Cells(torch.empty(0), every, every[:0])
        if recipe.image != "view":
            cells = draw_cells(keys, self.image_size, self.cell, self.settings.mask_ratio, device)
        sources = [Source(cells.visible, own)]
        if recipe.image == "mixed":
            pi = partners(batch.positions, keys, self.settings.mix_probability)
            sources.append(Source(cells.hidden, pi))
            images = self._normalized(mix(first, first[pi], cells))
        else:
            images = self._normalized(first)
        if recipe.image == "masked":
            images = images * (~cells.pixels).to(images.dtype)
        with drawing_from(sample_keys(keys, batch.positions)):
            fused = self.image.forward_fused(images).flatten(1, 2)

        parts: dict[str, Tensor] = {}
        for (target, source), c in zip(self._predictions(sources), self._correlations(targets, metrics), strict=True):
            parts[target.name] = self._dense(target, source, c, fused, batch, targets[target.name], cells, metrics)
        if self._on("pixels"):
            parts["pixels"] = self._pixels(metrics.watch_gradient(fused, "pixels"), first, cells)
        if self._on("text") or self._on("category") or self._on("pooled"):
            seen = metrics.watch_gradient(fused, "pooled")
            pooled = torch.stack([self.image.clip_projector(seen[:, s.tokens])[s.owner] for s in sources])
            if self._on("text"):
                text, scale = self.text(known.tokens), self.logit_scale()
                parts["text"] = text_loss(metrics.watch_gradient(pooled, "text"), text, scale, known, metrics)
            if self._on("category"):
                parts["category"] = self._category(metrics.watch_gradient(pooled, "category"), known, metrics)
            if self._on("pooled"):
                parts["pooled"] = self._pooled(pooled[0], targets["pooled"])
        return parts

    def _predictions(self, sources: list[Source]) -> list[tuple[DenseTarget, Source]]:
        """Which image's tokens predict which target."""
        if self.recipe.image != "mixed":
            return [(target, sources[0]) for target in self.dense_targets]
        return [(target, sources[target.view]) for target in self.dense_targets]

    def _correlations(self, targets: TeacherTargets, metrics: Metrics) -> Sequence[Tensor | None]:
        if not self.dense_targets or not (self.decorrelation > 0 or metrics.enabled):
            return [None] * len(self.dense_targets)
        return losses.correlations([targets[target.name] for target in self.dense_targets])

    def _dense(
        self,
        target: DenseTarget,
        source: Source,
        c: Tensor | None,
        fused: Tensor,
        batch: Batch[Targets],
        t: Tensor,
        cells: Cells,
        metrics: Metrics,
    ) -> Tensor:
        grid, view = self.image_size // TOKEN, self.recipe.view
        precise = torch.promote_types(fused.dtype, torch.float32)
        parameters = identity_parameters(len(fused), fused.device, precise)
        if target.view != view:
            crops = batch.crops[source.owner].to(precise)
            parameters = relative_parameters(crops[:, view], crops[:, target.view])
        projected = self.projector(metrics.watch_gradient(fused, target.name)[:, source.tokens])
        p = self.predictor(projected, source.tokens, parameters, grid)
        if target.hidden_only:
            p, t = p[:, cells.hidden], t[:, cells.hidden]
        positive, negative = losses.dense_loss(p, t, c, self.decorrelation)
        if c is not None:
            unseen = cells.hidden[:0] if target.hidden_only else cells.hidden
            metrics.dense(target.name, p, t, c, (positive, negative), unseen)
        return positive + negative

    def _pixels(self, fused: Tensor, views: Tensor, cells: Cells) -> Tensor:
        """SimMIM: L1 between the hidden normalised pixels and a Linear's guess at each hidden token."""
        grid = self.image_size // TOKEN
        pixels = normalize(views, self.mean, self.std).unflatten(2, (grid, TOKEN)).unflatten(4, (grid, TOKEN))
        patches: Tensor = pixels.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        guess: Tensor = self.pixel_head(fused[:, cells.hidden])
        return (losses.full(guess) - patches[:, cells.hidden]).abs().mean()

    def _pooled(self, pooled: Tensor, target: Tensor) -> Tensor:
        query = losses.unit(self.pooled_predictor(self.pooled_projector(pooled)))
        if self.recipe.pooled == "cosine":
            return (2 - 2 * (query * target).sum(-1)).mean()
        return info_nce(query, gather_rows(target), 1 / MOCO_TEMPERATURE)[0].mean()

    def _category(self, pooled: Tensor, known: ImageTextTargets, metrics: Metrics) -> Tensor:
        logits = self.image.head(self.image.fc_norm(pooled.flatten(0, 1)))
        labels, times = known.labels.repeat(len(pooled)), len(pooled)
        values = losses.category_loss(logits, labels, self.settings.label_smoothing).view(times, -1).mean(0)
        count = summed(known.has_label.sum())
        hits = (logits.detach().argmax(1) == labels).view(times, -1).float().mean(0)
        metrics.add("category/accuracy", lambda: global_mean(hits, known.has_label, count))
        return global_mean(values, known.has_label, count)
