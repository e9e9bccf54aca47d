"""The objective as one module: batch in, loss out. Everything trainable hangs below it; the teacher is a copy beside
it.

batch --mix/mask--> image --fused map F--+-- projector, predictor ---- dense loss ----- teacher(view 1 or 2)
                                         +-- attention pool -- g --+-- InfoNCE -------- text(tokens)
                                                                   +-- fc_norm, head -- labels
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.reading.batch import Batch, normalize
from pretrain.models import InternImage
from pretrain.models.randomness import sample_keys as drawing_from
from pretrain.models.recomputation import values_within
from pretrain.objectives import losses
from pretrain.objectives.collectives import gather_rows, global_mean, summed
from pretrain.objectives.contrastive import contrast, text_loss
from pretrain.objectives.decoder import Blocks
from pretrain.objectives.keys import StepKeys, sample_keys
from pretrain.objectives.metrics import Measures, collapse_alarms
from pretrain.objectives.mixing import TOKEN, Cells, draw_cells, mix, pairing, partners
from pretrain.objectives.mixup import mix_pairs
from pretrain.objectives.position import identity_parameters, relative_parameters
from pretrain.objectives.recipes import MOCO_TEMPERATURE, DenseTarget, Recipe
from pretrain.objectives.teacher import Teacher, teacher_of
from pretrain.objectives.text import drop_tokens

PATIENCE = 3  # measurements in a row that an alarm needs


class LossOutput(NamedTuple):
    """total: scalar whose mean over ranks is the loss of the joined micro-batch (back-propagate this). parts: each
    unweighted loss, same convention, detached. metrics: diagnostics, to be averaged over ranks; read them after the
    backward pass, which adds the gradient norms.
    """

    total: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Source(NamedTuple):
    """The tokens of the fused map that belong to one image of each row. owner: int64 [B], that image's row; an
    involution.
    """

    tokens: Tensor
    owner: Tensor


class Task(nn.Module):
    """One preset over one InternImage. Built by `build_task`.

    Modules that a preset does without are absent. `weights` holds the losses that are on.
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
        recipe: Recipe,
        weights: dict[str, float],
        modules: dict[str, nn.Module],
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        cell: int,
        mask_ratio: float,
        mix_probability: float,
        decorrelation: float,
        smoothing: float,
        mixup: float,
        cutmix: float,
        dim: int,
        token_dropout: float,
        make_image: Callable[[], nn.Module],
        make_projector: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.recipe, self.weights = recipe, weights
        self.image_size, self.mean, self.std = image_size, tuple(mean), tuple(std)
        self.cell, self.mask_ratio, self.dim = cell, mask_ratio, dim
        self.decorrelation = decorrelation if recipe.decorrelated else 0.0
        self.mix_probability = mix_probability
        self.smoothing, self.mixup, self.cutmix = smoothing, mixup, cutmix
        self.token_dropout = token_dropout
        self.dense_targets = tuple(d for d in recipe.dense if d.name in weights)
        self._suspected: dict[str, int] = {}
        self.make_image, self.make_projector = make_image, make_projector
        for name, module in modules.items():
            self.add_module(name, module)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks of every Transformer and of the image encoder in the backward pass."""
        for name in ("image", "text"):
            if hasattr(self, name):
                getattr(self, name).set_grad_checkpointing(enable)
        for module in self.modules():
            if isinstance(module, Blocks):
                module.checkpointing = enable

    def recompute_within(self, gigabytes: float, rows: int, width: int) -> None:
        """Recompute in the image encoder only what does not fit into the budget, `rows` images of values of `width`
        bytes at once; elsewhere blocks. Raises UserError where it is too small.
        """
        budget = values_within(gigabytes, self.image.arguments, self.image_size, rows=rows, width=width)
        self.image.recompute_within(budget, self.image_size)

    # -- what training calls

    def teacher(self) -> Teacher | None:
        """A fresh module with the momentum-averaged parts, holding this task's present values, in eval mode and
        without gradients. Parameters that are partitioned at the time (ZeRO-3) are left for the caller to fill. None
        where no loss has a momentum target.
        """
        return teacher_of(self) if self.dense_targets or self._on("pooled") else None

    def teacher_names(self) -> list[str]:
        """The teacher's parameters, as `state_dict()` of the task names them too."""
        if not (self.dense_targets or self._on("pooled")):
            return []
        heads = ("projector.",) if self.dense_targets else ("pooled_projector.", "image.clip_projector.")
        kept = ("image.stem.", "image.stages.", "image.fuse.", *heads)
        return [name for name, _ in self.named_parameters() if name.startswith(kept)]

    @torch.no_grad()
    def targets(self, teacher: nn.Module, batch: Batch, keys: StepKeys) -> dict[str, Tensor]:
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
            views[at] = views[at][partners(batch.positions, keys, self.mix_probability)]
        dtype = next(teacher.parameters()).dtype
        out = teacher(normalize(torch.cat(views), self.mean, self.std, dtype))
        return dict(zip(names, out.chunk(len(names)), strict=True))

    def forward(self, batch: Batch, keys: StepKeys, targets: dict[str, Tensor] | None = None) -> LossOutput:
        """Raises UserError where an objective that mixes pairs is given an odd local batch."""
        measures = Measures(keys.measure)
        if self.recipe.whole_model:
            parts = {"category": self._supervised(batch, keys, measures)}
        else:
            parts = self._fused_losses(batch, keys, targets or {}, measures)
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return LossOutput(total, {name: part.detach() for name, part in parts.items()}, measures.values)

    def alarms(self, metrics: dict[str, float]) -> list[str]:
        """Signs of collapse in metrics averaged over ranks that `PATIENCE` calls in a row agree on
        (metrics.collapse_alarms).
        """
        found = collapse_alarms(metrics, self.dim, self.decorrelation)
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
        if not hasattr(self, "text"):
            raise UserError("encode_text: this objective has no text tower; choose a preset with one (m3i, clip)")
        return losses.unit(self.text(tokens))

    def classify(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> logits [B, classes]."""
        return self.image(images)

    # -- the losses

    def _on(self, name: str) -> bool:
        return name in self.weights

    def _normalized(self, views: Tensor) -> Tensor:
        return normalize(views, self.mean, self.std, next(self.image.parameters()).dtype)

    def _supervised(self, batch: Batch, keys: StepKeys, measures: Measures) -> Tensor:
        keyed = sample_keys(keys, batch.positions)
        images, labels, valid = self._normalized(batch.views[:, 0]), batch.labels, batch.has_label
        share = None
        if self.training and (self.mixup > 0 or self.cutmix > 0):
            images, share = mix_pairs(images, keyed, self.mixup, self.cutmix)
        with drawing_from(keyed):
            logits = self.image(images)
        targets = labels
        if share is not None:
            pi = pairing(len(labels), labels.device)
            own = F.one_hot(labels.clamp_min(0), logits.shape[-1])
            targets = share[:, None] * own + (1 - share[:, None]) * own[pi]
            valid = valid & (batch.has_label[pi] | (share == 1))
        values = losses.category_loss(logits, targets, self.smoothing)
        count = summed(valid.sum())
        measures.add("category/accuracy", lambda: global_mean((logits.argmax(1) == labels).float(), valid, count))
        return global_mean(values, valid, count)

    def _fused_losses(
        self, batch: Batch, keys: StepKeys, targets: dict[str, Tensor], measures: Measures
    ) -> dict[str, Tensor]:
        recipe, rows = self.recipe, len(batch.positions)
        device = batch.views.device
        own = torch.arange(rows, device=device)
        grid = self.image_size // TOKEN
        first = batch.views[:, recipe.view]
        every = torch.arange(grid * grid, device=device)
        cells = Cells(torch.empty(0), every, every[:0])
        if recipe.image != "view":
            cells = draw_cells(keys, self.image_size, self.cell, self.mask_ratio, device)
        sources = [Source(cells.visible, own)]
        if recipe.image == "mixed":
            pi = partners(batch.positions, keys, self.mix_probability)
            sources.append(Source(cells.hidden, pi))
            images = self._normalized(mix(first, first[pi], cells))
        else:
            images = self._normalized(first)
        if recipe.image == "masked":
            images = images * (~cells.pixels).to(images.dtype)
        with drawing_from(sample_keys(keys, batch.positions)):
            fused = self.image.forward_fused(images).flatten(1, 2)

        parts: dict[str, Tensor] = {}
        for (target, source), c in zip(self._predictions(sources), self._correlations(targets, measures), strict=True):
            parts[target.name] = self._dense(target, source, c, fused, batch, targets[target.name], cells, measures)
        if self._on("pixels"):
            parts["pixels"] = self._pixels(measures.probe(fused, "pixels"), first, cells)
        if self._on("text") or self._on("category") or self._on("pooled"):
            seen = measures.probe(fused, "pooled")
            pooled = torch.stack([self.image.clip_projector(seen[:, s.tokens])[s.owner] for s in sources])
            if self._on("text"):
                tokens = batch.tokens
                if self.training and self.token_dropout > 0:
                    tokens = drop_tokens(tokens, sample_keys(keys, batch.positions), self.token_dropout)
                text, scale = self.text(tokens), self.logit_scale()
                parts["text"] = text_loss(measures.probe(pooled, "text"), text, scale, batch, measures)
            if self._on("category"):
                parts["category"] = self._category(measures.probe(pooled, "category"), batch, measures)
            if self._on("pooled"):
                parts["pooled"] = self._pooled(pooled[0], targets["pooled"])
        return parts

    def _predictions(self, sources: list[Source]) -> list[tuple[DenseTarget, Source]]:
        """Which image's tokens predict which target."""
        if self.recipe.image != "mixed":
            return [(target, sources[0]) for target in self.dense_targets]
        return [(target, sources[target.view]) for target in self.dense_targets]

    def _correlations(self, targets: dict[str, Tensor], measures: Measures) -> Sequence[Tensor | None]:
        if not self.dense_targets or not (self.decorrelation > 0 or measures.enabled):
            return [None] * len(self.dense_targets)
        return losses.correlations([targets[target.name] for target in self.dense_targets])

    def _dense(
        self,
        target: DenseTarget,
        source: Source,
        c: Tensor | None,
        fused: Tensor,
        batch: Batch,
        t: Tensor,
        cells: Cells,
        measures: Measures,
    ) -> Tensor:
        grid, view = self.image_size // TOKEN, self.recipe.view
        precise = torch.promote_types(fused.dtype, torch.float32)
        parameters = identity_parameters(len(fused), fused.device, precise)
        if target.view != view:
            crops = batch.crops[source.owner].to(precise)
            parameters = relative_parameters(crops[:, view], crops[:, target.view])
        projected = self.projector(measures.probe(fused, target.name)[:, source.tokens])
        p = self.predictor(projected, source.tokens, parameters, grid)
        if target.hidden_only:
            p, t = p[:, cells.hidden], t[:, cells.hidden]
        positive, negative = losses.dense_loss(p, t, c, self.decorrelation)
        if c is not None:
            unseen = cells.hidden[:0] if target.hidden_only else cells.hidden
            measures.dense(target.name, p, t, c, (positive, negative), unseen)
        return positive + negative

    def _pixels(self, fused: Tensor, views: Tensor, cells: Cells) -> Tensor:
        """SimMIM: L1 between the hidden normalised pixels and a Linear's guess at each hidden token."""
        grid = self.image_size // TOKEN
        pixels = normalize(views, self.mean, self.std).unflatten(2, (grid, TOKEN)).unflatten(4, (grid, TOKEN))
        patches = pixels.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        guess = self.pixel_head(fused[:, cells.hidden])
        return (losses.full(guess) - patches[:, cells.hidden]).abs().mean()

    def _pooled(self, pooled: Tensor, target: Tensor) -> Tensor:
        query = losses.unit(self.pooled_predictor(self.pooled_projector(pooled)))
        if self.recipe.pooled == "cosine":
            return (2 - 2 * (query * target).sum(-1)).mean()
        return contrast(query, gather_rows(target), 1 / MOCO_TEMPERATURE)[0].mean()

    def _category(self, pooled: Tensor, batch: Batch, measures: Measures) -> Tensor:
        logits = self.image.head(self.image.fc_norm(pooled.flatten(0, 1)))
        labels, times = batch.labels.repeat(len(pooled)), len(pooled)
        values = losses.category_loss(logits, labels, self.smoothing).view(times, -1).mean(0)
        count = summed(batch.has_label.sum())
        hits = (logits.detach().argmax(1) == labels).view(times, -1).float().mean(0)
        measures.add("category/accuracy", lambda: global_mean(hits, batch.has_label, count))
        return global_mean(values, batch.has_label, count)
