"""Every preset's loss once more, as its paper tells it: one process, loops over samples, no code of
pretrain.objectives.

Only the networks themselves (encoder, pooling, projector, predictor blocks, text tower) are the task's own; how their
inputs are made and what is compared with what is written anew. fp64.
"""

import math

import torch
from objective_samples import SIZE
from torch import Tensor

from data_pipeline.reading.batch import normalize
from pretrain.models.randomness import drawing_from
from pretrain.objectives.keys import second_view_keys


def images_of(task, views: Tensor) -> Tensor:
    return normalize(views, task.mean, task.std, torch.float64)


def wave(value: float, dim: int) -> list[float]:
    angles = [value * 10000 ** (-k / (dim // 2)) for k in range(dim // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def place(y: float, x: float, dim: int) -> list[float]:
    return wave(y, dim // 2) + wave(x, dim // 2)


def target_embedding(input_crop, target_crop, grid: int, dim: int) -> Tensor:
    """[grid * grid, 2 * dim]: the centres of the target's tokens, carried into the unflipped source and from there to
    the input view.
    """
    i1, j1, h1, w1, f1, width = (float(v) for v in input_crop)
    i2, j2, h2, w2, f2, _ = (float(v) for v in target_crop)
    rows = []
    for r in range(grid):
        for c in range(grid):
            source_y, source_x = i2 + (r + 0.5) / grid * h2, j2 + (c + 0.5) / grid * w2
            if f2:
                source_x = width - source_x
            if f1:
                source_x = width - source_x
            y, x = (source_y - i1) / h1 * grid - 0.5, (source_x - j1) / w1 * grid - 0.5
            scale = wave(10 * math.log(h2 / h1), dim // 2) + wave(10 * math.log(w2 / w1), dim // 2)
            rows.append(place(y, x, dim) + scale)
    return torch.tensor(rows, dtype=torch.float64)


def predict(task, tokens: Tensor, index: list[int], queries: Tensor, grid: int) -> Tensor:
    """One sample: projected tokens [n, D] at `index`, query embeddings [G*G, 2D] -> [G*G, D]."""
    dim, predictor = tokens.shape[-1], task.predictor
    known = tokens + torch.tensor([place(i // grid, i % grid, dim) for i in index], dtype=torch.float64)
    asked = predictor.mask_token[0] + queries @ predictor.position.weight.T + predictor.position.bias
    x = torch.cat([known, asked])[None]
    for block in predictor.blocks:
        x = block(x)
    return predictor.head(predictor.norm(x[0, len(index) :]))


def teacher_tokens(teacher, image: Tensor) -> Tensor:
    with torch.no_grad():
        x = teacher.projector(teacher.image.forward_fused(image[None]).flatten(1, 2))[0]
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def dense(predictions: list[Tensor], targets: list[Tensor], decorrelation: float) -> Tensor:
    p, t = torch.cat(predictions), torch.cat(targets)
    positive = (p - t).square().sum(1).mean()
    negative = (p @ t.T).square().mean()  # every prediction with every target: N x N
    return (positive + decorrelation * negative) / p.shape[1]


def info_nce(images: Tensor, texts: Tensor, scale: Tensor, captions: list[tuple[int, ...]]) -> Tensor:
    terms = []
    for a, b in ((images, texts), (texts, images)):
        for i in range(len(a)):
            others = [j for j in range(len(b)) if j == i or captions[j] != captions[i]]
            logits = torch.stack([scale * (a[i] @ b[j]) for j in others])
            terms.append(torch.logsumexp(logits, 0) - scale * (a[i] @ b[i]))
    return torch.stack(terms).mean()


def cross_entropy(logits: Tensor, share: dict[int, float], smoothing: float) -> Tensor:
    count = len(logits)
    log_probability = logits - torch.logsumexp(logits, 0)
    target = torch.full((count,), smoothing / count, dtype=torch.float64)
    for label, weight in share.items():
        target[label] += (1 - smoothing) * weight
    return -(target * log_probability).sum()


def normed(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class Plain:
    """`loss(preset)` for a task, its teacher, a batch, the hidden cells of the step and the sample keys."""

    def __init__(self, task, teacher, batch, cells, keys) -> None:
        self.task, self.teacher, self.batch, self.keys = task, teacher, batch, keys
        self.rows, self.grid = len(batch.positions), SIZE // 16
        self.hidden_pixels = cells.pixels
        hidden = [bool(cells.pixels[16 * r, 16 * c]) for r in range(self.grid) for c in range(self.grid)]
        self.hidden = [i for i, h in enumerate(hidden) if h]
        self.visible = [i for i, h in enumerate(hidden) if not h]
        self.pair = [i + 1 if i % 2 == 0 else i - 1 for i in range(self.rows)]

    def encode(self, images: Tensor) -> Tensor:
        with drawing_from(self.keys):
            return self.task.image.forward_fused(images).flatten(1, 2)

    def m3i(self) -> Tensor:
        task, batch = self.task, self.batch
        view1, view2 = images_of(task, batch.views[:, 0]), images_of(task, batch.views[:, 1])
        mixed = view1.clone()
        for i in range(self.rows):
            mixed[i][:, self.hidden_pixels] = view1[self.pair[i]][:, self.hidden_pixels]
        fused = self.encode(mixed)
        sums: dict[str, list[Tensor]] = {name: [] for name in ("pa", "ta", "pb", "tb")}
        for i, j in enumerate(self.pair):
            a, b = (task.projector(fused[i : i + 1, index])[0] for index in (self.visible, self.hidden))
            same = target_embedding(batch.crops[i, 0], batch.crops[i, 0], self.grid, task.settings.decoder.dim)
            other = target_embedding(batch.crops[j, 0], batch.crops[j, 1], self.grid, task.settings.decoder.dim)
            sums["pa"].append(predict(task, a, self.visible, same, self.grid))
            sums["pb"].append(predict(task, b, self.hidden, other, self.grid))
            sums["ta"].append(teacher_tokens(self.teacher, view1[i]))
            sums["tb"].append(teacher_tokens(self.teacher, view2[j]))
        w = task.weights
        total = w["intra"] * dense(sums["pa"], sums["ta"], 0.02) + w["inter"] * dense(sums["pb"], sums["tb"], 0.02)
        for index, mine in ((self.visible, range(self.rows)), (self.hidden, self.pair)):
            pooled = task.image.clip_projector(fused[:, index])
            whole = task.image.clip_projector(fused)  # of an image that is its own partner
            # The pairing is its own inverse.
            vectors = torch.stack([whole[k] if self.pair[k] == k else pooled[k] for k in mine])
            total = total + w["text"] / 2 * self.text(vectors) + w["category"] / 2 * self.category(vectors)
        return total

    def text(self, vectors: Tensor) -> Tensor:
        batch, task = self.batch, self.task
        captioned = [i for i in range(self.rows) if batch.targets.has_text[i]]
        captions = [tuple(batch.targets.tokens[i].tolist()) for i in captioned]
        texts = normed(task.text(batch.targets.tokens[captioned]))
        return info_nce(normed(vectors[captioned]), texts, task.logit_scale.log.exp()[0], captions)

    def category(self, vectors: Tensor) -> Tensor:
        batch, head = self.batch, self.task.image
        labelled = [i for i in range(self.rows) if batch.targets.has_label[i]]
        logits = head.head(head.fc_norm(vectors[labelled]))
        values = [
            cross_entropy(x, {int(batch.targets.labels[i]): 1.0}, 0.0) for x, i in zip(logits, labelled, strict=True)
        ]
        return torch.stack(values).mean()

    def clip(self) -> Tensor:
        fused = self.encode(images_of(self.task, self.batch.views[:, 0]))
        return self.text(self.task.image.clip_projector(fused))

    def clip_category(self) -> Tensor:
        vectors = self.task.image.clip_projector(self.encode(images_of(self.task, self.batch.views[:, 0])))
        return self.text(vectors) + self.category(vectors)

    def masked(self) -> tuple[Tensor, Tensor]:
        view = images_of(self.task, self.batch.views[:, 0])
        seen = view.clone()
        seen[:, :, self.hidden_pixels] = 0
        return self.encode(seen), view

    def siamese(self) -> Tensor:
        fused, _ = self.masked()
        view2 = images_of(self.task, self.batch.views[:, 1])
        p, t = [], []
        for i in range(self.rows):
            tokens = self.task.projector(fused[i : i + 1, self.visible])[0]
            where = target_embedding(
                self.batch.crops[i, 0], self.batch.crops[i, 1], self.grid, self.task.settings.decoder.dim
            )
            p.append(predict(self.task, tokens, self.visible, where, self.grid))
            t.append(teacher_tokens(self.teacher, view2[i]))
        return dense(p, t, 0.02)

    def data2vec(self) -> Tensor:
        fused, view = self.masked()
        p, t = [], []
        for i in range(self.rows):
            tokens = self.task.projector(fused[i : i + 1, self.visible])[0]
            where = target_embedding(
                self.batch.crops[i, 0], self.batch.crops[i, 0], self.grid, self.task.settings.decoder.dim
            )
            p.append(predict(self.task, tokens, self.visible, where, self.grid)[self.hidden])
            t.append(teacher_tokens(self.teacher, view[i])[self.hidden])
        return dense(p, t, 0.0)

    def simmim(self) -> Tensor:
        fused, view = self.masked()
        errors = []
        for i in range(self.rows):
            for token in self.hidden:
                r, c = 16 * (token // self.grid), 16 * (token % self.grid)
                patch = view[i, :, r : r + 16, c : c + 16].permute(1, 2, 0).flatten()
                errors.append((self.task.pixel_head(fused[i, token]) - patch).abs().mean())
        return torch.stack(errors).mean()

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        task, teacher = self.task, self.teacher
        fused = self.encode(images_of(task, self.batch.views[:, 1]))
        q = normed(task.pooled_predictor(task.pooled_projector(task.image.clip_projector(fused))))
        with torch.no_grad():
            other = teacher.image.forward_fused(images_of(task, self.batch.views[:, 0])).flatten(1, 2)
            k = normed(teacher.pooled_projector(teacher.image.clip_projector(other)))
        return q, k

    def byol(self) -> Tensor:
        q, k = self.queries_and_keys()
        return torch.stack([(q[i] - k[i]).square().sum() for i in range(self.rows)]).mean()

    def moco(self) -> Tensor:
        q, k = self.queries_and_keys()
        logits = q @ k.T / 0.2
        return torch.stack([torch.logsumexp(row, 0) - row[i] for i, row in enumerate(logits)]).mean()

    def views_of_the_encoder(self) -> list[Tensor]:
        """[view 1, view 2], each [B, embed_dim]; the second view's rows draw from keys of their own."""
        keys = torch.cat([self.keys, second_view_keys(self.keys)])
        with drawing_from(keys):
            views = torch.cat([images_of(self.task, self.batch.views[:, v]) for v in (0, 1)])
            fused = self.task.image.forward_fused(views).flatten(1, 2)
        return list(self.task.image.clip_projector(fused).split(self.rows))

    def simclr(self) -> Tensor:
        z = [normed(self.task.pooled_projector(x)) for x in self.views_of_the_encoder()]
        terms = []
        for a, b in ((0, 1), (1, 0)):
            for i in range(self.rows):
                others = [z[v][k] for v in (0, 1) for k in range(self.rows) if (v, k) != (a, i)]
                logits = torch.stack([z[a][i] @ other / 0.1 for other in others])
                terms.append(torch.logsumexp(logits, 0) - z[a][i] @ z[b][i] / 0.1)
        return torch.stack(terms).mean()

    def simsiam(self) -> Tensor:
        z = [self.task.pooled_projector(x) for x in self.views_of_the_encoder()]
        p = [normed(self.task.pooled_predictor(x)) for x in z]
        fixed = [normed(x.detach()) for x in z]
        return torch.stack([-(p[0][i] @ fixed[1][i] + p[1][i] @ fixed[0][i]) / 2 for i in range(self.rows)]).mean()

    def siglip(self) -> Tensor:
        task, known = self.task, self.batch.targets
        have = [i for i in range(self.rows) if known.has_text[i]]
        images = normed(task.image.clip_projector(self.encode(images_of(task, self.batch.views[:, 0]))))
        texts = normed(task.text(known.tokens))
        scale, bias = task.logit_scale.log.exp()[0], task.logit_bias.value[0]
        total = torch.zeros((), dtype=torch.float64)
        for i in have:
            for j in have:
                same = known.tokens[i].tolist() == known.tokens[j].tolist()
                if i == j or not same:
                    sign = 1 if i == j else -1
                    total = total + torch.log1p(torch.exp(-sign * (scale * (images[i] @ texts[j]) + bias)))
        return total / len(have)

    def supervised(self, shares: Tensor | None = None, images: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        batch = self.batch
        with drawing_from(self.keys):
            logits = self.task.image(images_of(self.task, batch.views[:, 0]) if images is None else images)
        values = []
        for i in range(self.rows):
            if not batch.targets.has_label[i]:
                continue
            label, weights = int(batch.targets.labels[i]), {}
            if shares is None:
                weights[label] = 1.0
            elif batch.targets.has_label[self.pair[i]]:
                weights[label] = float(shares[i])
                other = int(batch.targets.labels[self.pair[i]])
                weights[other] = weights.get(other, 0.0) + 1 - float(shares[i])
            else:
                continue
            values.append(cross_entropy(logits[i], weights, smoothing))
        return torch.stack(values).mean()
