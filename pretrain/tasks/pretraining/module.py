"""Image-text pretraining as one module: batch in, loss out. All that is trained hangs below it; the teacher is a copy.

batch --mix/mask--> image --fused map F--+-- projector, predictor ---- dense loss ----- teacher(view 1 or 2)
                                         +-- attention pool -- g --+-- InfoNCE -------- text(tokens)
                                                                   +-- fc_norm, head -- labels
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.reading import ImageTextTargets, Targets
from data_pipeline.reading.batch import Batch, normalize
from data_pipeline.reading.config import DataConfig
from pretrain.models import InternImage
from pretrain.models.randomness import drawing_from
from pretrain.objectives import losses
from pretrain.objectives.balance import balanced
from pretrain.objectives.chunks import in_chunks
from pretrain.objectives.collectives import gather_rows, global_mean, summed
from pretrain.objectives.contrastive import info_nce, text_loss
from pretrain.objectives.decoder import Blocks
from pretrain.objectives.keys import StepKeys
from pretrain.objectives.metrics import Metrics, collapse_alarms
from pretrain.objectives.mixing import TOKEN, Cells, cell_size, partners, tokens_at
from pretrain.objectives.pooled import cosine_loss, nt_xent, symmetric_cosine_loss
from pretrain.objectives.position import identity_parameters, relative_parameters
from pretrain.objectives.sigmoid import sigmoid_text_loss
from pretrain.objectives.text import load_text_tower
from pretrain.tasks.module import BackboneLayout, LossOutput, TaskModule, TeacherTargets, image_text_of, layout_of
from pretrain.tasks.pretraining.inputs import Seen, Source, seen_by_the_encoder
from pretrain.tasks.pretraining.recipes import MOCO_TEMPERATURE, RECIPES, SIMCLR_TEMPERATURE, DenseTarget
from pretrain.tasks.pretraining.teacher import Teacher, TeacherRecipe

if TYPE_CHECKING:
    from pretrain.tasks.pretraining.task import Pretraining

PATIENCE = 3  # measurements in a row that an alarm needs


class PretrainingModule(TaskModule):
    """One preset over one InternImage. Built by `build_pretraining`.

    Parts that a preset does without are absent. `weights` holds the losses that are on.
    """

    image: InternImage
    text: nn.Module
    logit_scale: nn.Module
    logit_bias: nn.Module
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

    def begin(self) -> None:
        if self.has_text and self.settings.text.weights is not None:
            load_text_tower(self.text, self.settings.text.weights)

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
        vectors [B, D] for pooled ones; nothing on a step without dense losses. Row i of a mixed input's second target
        is that of its second image.
        """
        if self.dense_targets and not self._dense_now(keys):
            return {}
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
        """Signs of collapse that `PATIENCE` measurements in a row agree on (objectives/metrics.py). A call without a
        target's measurement, as on a step without dense losses, says nothing of that target.
        """
        found = collapse_alarms(metrics, self.settings.decoder.dim, self.decorrelation)
        measured = {name.partition("/")[0] for name in metrics if name.endswith("/feature_std")}
        before = {kind: times for kind, times in self._suspected.items() if kind.partition("/")[0] not in measured}
        self._suspected = before | {kind: self._suspected.get(kind, 0) + 1 for kind in found}
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

    def _on(self, *names: str) -> bool:
        return any(name in self.weights for name in names)

    def _normalized(self, views: Tensor) -> Tensor:
        return normalize(views, self.mean, self.std, next(self.image.parameters()).dtype)

    def _dense_now(self, keys: StepKeys) -> bool:
        """Whether this step has the dense losses: every `task.dense_every`-th has, counted as `log_every` counts."""
        return bool(self.dense_targets) and (keys.step + 1) % self.settings.dense_every == 0

    def _losses(
        self, batch: Batch[Targets], keys: StepKeys, targets: TeacherTargets, metrics: Metrics
    ) -> dict[str, Tensor]:
        known, rows = image_text_of(batch), self.settings.encode_rows
        seen = seen_by_the_encoder(self.recipe, self.settings, batch, keys, self.cell)
        images = self._normalized(seen.pixels)
        if self.recipe.image == "masked":
            images = images * (~seen.cells.pixels.view(-1, 1, *images.shape[2:])).to(images.dtype)
        fused = in_chunks(self._encode, rows, images, seen.keys)
        now = self._dense_now(keys)
        of = self._aliases(fused, now, metrics)

        parts: dict[str, Tensor] = {}
        if not now:
            parts |= {target.name: self._idle(fused, seen.sources[0]) for target in self.dense_targets}
        else:
            correlations = self._correlations(targets, metrics)
            for (target, source), c in zip(self._predictions(seen.sources), correlations, strict=True):
                dense = self._dense(target, source, c, of[target.name], batch, targets[target.name], seen, metrics)
                parts[target.name] = dense
        if self._on("pixels"):
            parts["pixels"] = self._pixels(of["pixels"], batch.views[:, self.recipe.view], seen.cells)
        if self._on("text", "category", "pooled"):
            pooled = self._pool(of["pooled"], seen)
            if self._on("text"):
                text = in_chunks(self.text, rows, known.tokens)
                parts["text"] = self._text(metrics.watch_gradient(pooled, "text"), text, known, metrics)
            if self._on("category"):
                parts["category"] = self._category(metrics.watch_gradient(pooled, "category"), known, metrics)
            if self._on("pooled"):
                parts["pooled"] = self._pooled(pooled[0], targets, metrics)
        return parts

    def _encode(self, images: Tensor, keys: Tensor) -> Tensor:
        with drawing_from(keys):
            return self.image.forward_fused(images).flatten(1, 2)

    def _aliases(self, fused: Tensor, now: bool, metrics: Metrics) -> dict[str, Tensor]:
        """The fused map as each loss sees it; where dense losses are balanced, their gradients meet here."""
        dense: list[str] = [target.name for target in self.dense_targets] if now else []
        found = dict.fromkeys([*dense, *(["pixels"] if self._on("pixels") else []), "pooled"], fused)
        if self.settings.balance is not None and dense and self._on("text", "category"):
            shares = [self.settings.balance * self.weights[name] for name in dense]
            found["pooled"], *others = balanced(fused, shares, partial(metrics.note, [f"balance/{n}" for n in dense]))
            found |= zip(dense, others, strict=True)
        return {name: metrics.watch_gradient(alias, name) for name, alias in found.items()}

    def _pool(self, fused: Tensor, seen: Seen) -> Tensor:
        """Pooled vectors [k, R, embed_dim]: k is 2 where rows hold two images, each pooled over its own tokens. An
        image that was left whole is pooled over all of its tokens, as it will be after pretraining.
        """
        pool: Callable[[Tensor], Tensor] = self.image.clip_projector
        mixed = self.settings.mix_probability if self.recipe.image == "mixed" else 0.0
        if mixed == 0:
            return pool(fused)[None]
        parts = torch.stack([pool(tokens_at(fused, s.tokens))[s.owner] for s in seen.sources])
        return parts if mixed == 1 else torch.where(seen.whole[:, None], pool(fused), parts)

    def _idle(self, fused: Tensor, source: Source) -> Tensor:
        """A dense loss on a step without it: 0, and a zero gradient for every parameter of its heads, which one row
        costs little to find. Without any, ZeRO-3 would take an earlier step's again.
        """
        tokens = source.tokens if source.tokens.ndim == 1 else source.tokens[0]
        parameters = identity_parameters(1, fused.device, torch.promote_types(fused.dtype, torch.float32))
        projected = self.projector(fused.detach()[:1, tokens])
        nothing: Tensor = self.predictor(projected, tokens, parameters, self.image_size // TOKEN).sum() * 0
        return nothing

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
        seen: Seen,
        metrics: Metrics,
    ) -> Tensor:
        grid, view = self.image_size // TOKEN, self.recipe.view
        precise = torch.promote_types(fused.dtype, torch.float32)
        parameters = identity_parameters(len(fused), fused.device, precise)
        if target.view != view:
            crops = batch.crops[source.owner].to(precise)
            parameters = relative_parameters(crops[:, view], crops[:, target.view])
        projected = self.projector(tokens_at(fused, source.tokens))
        p = self.predictor(projected, source.tokens, parameters, grid)
        hidden = seen.cells.hidden
        if target.hidden_only:
            p, t = tokens_at(p, hidden), tokens_at(t, hidden)
        positive, negative = losses.dense_loss(p, t, c, self.decorrelation)
        if c is not None:
            unseen = hidden[..., :0] if target.hidden_only else hidden
            metrics.dense(target.name, p, t, c, (positive, negative), unseen)
        return positive + negative

    def _pixels(self, fused: Tensor, views: Tensor, cells: Cells) -> Tensor:
        """SimMIM: L1 between the hidden normalised pixels and a Linear's guess at each hidden token."""
        grid = self.image_size // TOKEN
        pixels = normalize(views, self.mean, self.std).unflatten(2, (grid, TOKEN)).unflatten(4, (grid, TOKEN))
        patches: Tensor = pixels.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        guess: Tensor = self.pixel_head(tokens_at(fused, cells.hidden))
        return (losses.full(guess) - tokens_at(patches, cells.hidden)).abs().mean()

    def _text(self, pooled: Tensor, text: Tensor, known: ImageTextTargets, metrics: Metrics) -> Tensor:
        if self.recipe.text == "sigmoid":
            return sigmoid_text_loss(pooled, text, self.logit_scale(), self.logit_bias(), known, metrics)
        return text_loss(pooled, text, self.logit_scale(), known, metrics)

    def _pooled(self, pooled: Tensor, targets: TeacherTargets, metrics: Metrics) -> Tensor:
        """pooled: [B, embed_dim], or [2 B, embed_dim] where both views are rows; the heads see a view at a time."""
        projected = [self.pooled_projector(view) for view in pooled.chunk(2 if self.recipe.both_views else 1)]
        if self.recipe.pooled == "nt_xent":
            first, second = (losses.unit(view) for view in projected)
            metrics.pooled(first, second)
            return nt_xent(first, second, SIMCLR_TEMPERATURE)
        predicted = [losses.unit(self.pooled_predictor(view)) for view in projected]
        if self.recipe.pooled == "symmetric_cosine":
            projections = torch.stack([losses.unit(view) for view in projected])
            metrics.pooled(predicted[0], projections[1])
            return symmetric_cosine_loss(torch.stack(predicted), projections)
        query = predicted[0]
        metrics.pooled(query, targets["pooled"])
        if self.recipe.pooled == "cosine":
            return cosine_loss(query, targets["pooled"])
        return info_nce(query, gather_rows(targets["pooled"]), 1 / MOCO_TEMPERATURE)[0].mean()

    def _category(self, pooled: Tensor, known: ImageTextTargets, metrics: Metrics) -> Tensor:
        logits = self.image.head(self.image.fc_norm(pooled.flatten(0, 1)))
        labels, times = known.labels.repeat(len(pooled)), len(pooled)
        values = losses.category_loss(logits, labels, self.settings.label_smoothing).view(times, -1).mean(0)
        count = summed(known.has_label.sum())
        hits = (logits.detach().argmax(1) == labels).view(times, -1).float().mean(0)
        metrics.add("category/accuracy", lambda: global_mean(hits, known.has_label, count))
        return global_mean(values, known.has_label, count)
