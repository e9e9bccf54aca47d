"""What tells a collapsing run from a learning one, measured on the steps that are logged, and the alarms made of it.

For fixed targets the dense loss cannot fall below lambda/(1+lambda) ~ .02 (lambda .02) when their D channels are
decorrelated, nor below lambda D/(1+lambda D) ~ .94 (D 768) when they span one direction: a well-predicted loss that
stays high is itself an alarm.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.objectives.collectives import summed, world_size
from pretrain.objectives.losses import full
from pretrain.objectives.mixing import tokens_at


class Metrics:
    """Metrics of one micro-batch. Gradient norms are added while its backward pass runs."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.values: dict[str, Tensor] = {}

    def add(self, name: str, compute: Callable[[], Tensor]) -> None:
        if self.enabled:
            with torch.no_grad():
                self.values[name] = compute().detach().float()

    def watch_gradient(self, x: Tensor, name: str) -> Tensor:
        """`x` itself, as seen by one loss: its backward pass notes the norm of that loss's gradient here, at no extra
        pass.
        """
        # Also where nothing is noted: gradients then add up in the same order, to the same bits, on every step.
        alias = x.view_as(x)
        if not (self.enabled and x.requires_grad):
            return alias

        def note(grad: Tensor) -> None:
            self.values[f"grad_norm/{name}"] = full(grad.detach()).norm()

        alias.register_hook(note)
        return alias

    def note(self, names: Sequence[str], values: Tensor) -> None:
        """Values that the backward pass finds, one a name."""
        if self.enabled:
            self.values.update(zip(names, values.detach().float(), strict=True))

    def pooled(self, query: Tensor, target: Tensor) -> None:
        """Measure unit queries and targets [B, D] of pooled vectors, over all ranks."""
        if not self.enabled:
            return
        with torch.no_grad():
            t = full(target)
            moments = torch.cat([t.T @ t, t.mean(0, keepdim=True) * len(t)]) / (len(t) * world_size())
            *c, mean = summed(moments).unbind(0)
            centred = torch.stack(c) - mean[:, None] * mean
            self.add("pooled/cos", (full(query) * t).sum(-1).mean)
            self.add("pooled/feature_std", lambda: centred.trace().clamp_min(0).sqrt())
            self.add("pooled/rank", lambda: rank_me(centred))

    def dense(self, name: str, p: Tensor, t: Tensor, c: Tensor, terms: tuple[Tensor, Tensor], hidden: Tensor) -> None:
        """Measure predictions and targets [B, N, D], their correlation [D, D] and the two terms of the loss.

        hidden: int64 token indices ([n], or [B, n]) of the input view that the encoder did not see as this image's
        (only of meaning for the same view).
        """
        if not self.enabled:
            return
        self.add(f"{name}/positive", lambda: terms[0].detach())
        self.add(f"{name}/negative", lambda: terms[1].detach())
        self.add(f"{name}/feature_std", lambda: feature_std(t))
        self.add(f"{name}/rank", lambda: rank_me(c))
        self.add(f"{name}/content_share", lambda: content_share(t))
        with torch.no_grad():
            cosine = F.cosine_similarity(full(p), t, dim=-1)[..., None]
            self.add(f"{name}/cos", cosine.mean)
            if name == "intra" and hidden.shape[-1]:
                unseen = tokens_at(cosine, hidden)
                left = cosine.shape[1] - hidden.shape[-1]
                self.add("intra/cos_hidden", unseen.mean)
                self.add("intra/cos_visible", lambda: (cosine.sum() - unseen.sum()) / (left * len(cosine)))


def feature_std(t: Tensor) -> Tensor:
    """Standard deviation of unit features over samples and tokens, relative to the 1/sqrt(D) of isotropic ones: 1
    healthy, 0 collapsed.
    """
    flat = F.normalize(full(t).flatten(0, -2), dim=-1)
    return flat.var(0, unbiased=False).sum().sqrt()


def rank_me(c: Tensor) -> Tensor:
    """Effective rank (RankMe, Garrido et al. 2023): exp of the entropy of the features' normalised singular
    values, which are the square roots of the eigenvalues of their correlation C [D, D]. From 1 to D.
    """
    singular = torch.linalg.eigvalsh(full(c)).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-12)
    return torch.special.entr(share).sum().exp()


def content_share(t: Tensor) -> Tensor:
    """Share of the features' variance that is left after each position's mean over the batch is taken away: 0 when a
    feature tells only where it lies (position-only collapse). t: [B, N, D], B > 1.
    """
    t = full(t)
    batch = t.shape[0]
    if batch < 2:
        return torch.ones((), device=t.device)
    left = (t - t.mean(0, keepdim=True)).square().sum() / ((batch - 1) * t.shape[1])
    whole = (t - t.mean((0, 1), keepdim=True)).square().sum() / (batch * t.shape[1])
    return left / whole.clamp_min(1e-12)


def rank_one_loss(decorrelation: float, dim: int) -> float:
    """The least dense loss with targets that span one direction."""
    return decorrelation * dim / (1 + decorrelation * dim)


def collapse_alarms(metrics: Mapping[str, float], dim: int, decorrelation: float) -> dict[str, str]:
    """What is wrong, by kind, one sentence each; empty for a healthy run. metrics: those of a `LossOutput`.

    One measurement may mislead: `PretrainingModule.alarms` reports what several in a row agree on.
    """
    alarms = {}
    if "pooled/feature_std" in metrics:
        std, cosine, rank = (metrics[f"pooled/{name}"] for name in ("feature_std", "cos", "rank"))
        if std < 0.1:
            alarms["pooled/constant"] = (
                f"collapse, pooled: targets near constant (std of unit vectors {std:.3f}; healthy: near 1)"
            )
        if rank < 2 and cosine > 0.95:
            alarms["pooled/rank"] = f"collapse, pooled: targets differ in one direction (effective rank {rank:.1f})"
    for name in ("intra", "inter"):
        if f"{name}/feature_std" not in metrics:
            continue
        std, rank = metrics[f"{name}/feature_std"], metrics[f"{name}/rank"]
        share, cosine = metrics[f"{name}/content_share"], metrics[f"{name}/cos"]
        loss, floor = metrics[f"{name}/positive"] + metrics[f"{name}/negative"], rank_one_loss(decorrelation, dim)
        if std < 0.1:
            alarms[f"{name}/constant"] = (
                f"collapse, {name}: targets near constant (std of unit features {std:.3f}; healthy: near 1)"
            )
        if rank < max(2.0, 0.02 * dim):
            alarms[f"{name}/rank"] = (
                f"collapse, {name}: targets span few directions (effective rank {rank:.1f} of {dim})"
            )
        if share < 0.05:
            alarms[f"{name}/position"] = (
                f"collapse, {name}: targets tell positions, not images (share of content {share:.3f})"
            )
        if decorrelation > 0 and cosine > 0.95 and loss > 0.5 * floor:
            alarms[f"{name}/loss"] = (
                f"collapse, {name}: well predicted (cosine {cosine:.2f}) at a loss of {loss:.2f}, near the {floor:.2f} "
                "that targets of rank 1 leave"
            )
    return alarms
