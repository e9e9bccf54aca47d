"""The optimizers that DeepSpeed steps. A step can be vetoed after the gradients are in, under every ZeRO stage alike.

    adamw    torch.optim.AdamW over the flat fp32 groups, or over the parameters at stage 0
    muon     torch.optim.Muon (Jordan et al. 2024) over the matrices that parameter_groups.py names, AdamW over the rest

ZeRO 1 and 2 cut a flat group wherever a rank's share ends. A matrix that lies whole in one share is a view of it, and
its rank alone orthogonalises it, so that the work is shared out as the states are. One that is cut is orthogonalised by
each rank that holds a part of it: they send each other their parts of its gradient, and keep its whole momentum.

DeepSpeed 0.19 has a Muon of its own, which is not used: it clips, and reports as the gradient's norm, the norm of the
orthogonalised update, which says nothing of a spike; and it compiles its iteration at the first step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.configuration.schema import OptimizerConfig
from pretrain.training.distributed import DistributedContext
from pretrain.training.parameter_groups import ParameterGroup
from pretrain.training.zero.fragments import MOMENTUM, Fragment

RMS_AS_ADAMW = "match_rms_adamw"  # so that a learning rate and a weight decay of AdamW's serve (Liu et al. 2025)


class GuardedAdamW(torch.optim.AdamW):
    veto = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return None if self.veto else super().step(closure)

    def lay_out(self, held: Sequence[Fragment], context: DistributedContext) -> None:
        """Every state lies where its weights lie."""

    def settle(self) -> None:
        """Nothing is derived from the states that a checkpoint fills."""


class GuardedMuon(torch.optim.Optimizer):
    """groups: as for torch's optimizers, with `muon` (a bool) and `names` in each. `lay_out` before the first step."""

    veto = False

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerConfig) -> None:
        placed = [{**group, "place": place} for place, group in enumerate(groups)]
        super().__init__(placed, {"lr": 0.0, "weight_decay": 0.0})
        self._momentum = settings.momentum
        self._matrices: dict[int, _Matrices] = {}
        self._adam = torch.optim.AdamW([torch.zeros(1)], lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)
        self._adam.state = self.state
        for group in self.param_groups:
            if not group["muon"]:
                for name, value in self._adam.defaults.items():
                    group.setdefault(name, value)

    def lay_out(self, held: Sequence[Fragment], context: DistributedContext) -> None:
        """held: all that this rank holds, in the order of the module, when DeepSpeed has laid it out. Collective."""
        for group in self.param_groups:
            if group["muon"]:
                fragments = [fragment for fragment in held if fragment.name in group["names"]]
                self._matrices[group["place"]] = _Matrices(group["params"], fragments, self._momentum, context)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if self.veto:
            return
        adam = [group for group in self.param_groups if not group["muon"]]
        if adam:
            self._adam.param_groups = adam
            self._adam.step()
        for group in self.param_groups:  # of one group at a time at stages 1 and 2
            if group["muon"]:
                self._matrices[group["place"]].step(group["lr"], group["weight_decay"])

    @torch.no_grad()
    def settle(self) -> None:
        """The states were written from outside (a restored checkpoint). Collective."""
        for matrices in self._matrices.values():
            matrices.settle()


@dataclass(frozen=True)
class _Cut:
    """A matrix of which this rank holds `fragment`. whole: what torch's Muon steps in its place, of which this rank's
    part alone is ever right. others: (rank, start, length) of the parts elsewhere.
    """

    fragment: Fragment
    whole: nn.Parameter
    momentum: Tensor
    others: list[tuple[int, int, int]]

    def own(self, whole: Tensor) -> Tensor:
        return whole.view(-1).narrow(0, self.fragment.start, self.fragment.length)


class _Matrices:
    """One group of matrices. owners: the tensors that DeepSpeed gives gradients, which the fragments are parts of."""

    def __init__(
        self, owners: Sequence[Tensor], fragments: Sequence[Fragment], momentum: float, context: DistributedContext
    ) -> None:
        self._context = context
        self._whole: list[tuple[nn.Parameter, Tensor, int]] = []  # with its owner, and where it begins there
        self._cut: list[tuple[_Cut, Tensor, int]] = []
        momenta: dict[nn.Parameter, Tensor] = {}
        replicated = any(fragment.replicated for fragment in fragments)
        layouts = [[] if replicated else layout for layout in context.gather([_place(f) for f in fragments])]
        for fragment in fragments:
            rows, columns = fragment.shape
            owner, offset = _owner(owners, fragment.master)
            if fragment.length == rows * columns:
                whole = nn.Parameter(fragment.master.view(rows, columns))
                momenta[whole] = fragment.moments[MOMENTUM].view(rows, columns)
                self._whole.append((whole, owner, offset))
                continue
            others = [
                (rank, start, length)
                for rank, layout in enumerate(layouts)
                for name, start, length in layout
                if name == fragment.name and rank != context.rank
            ]
            whole = nn.Parameter(torch.zeros(rows, columns, dtype=owner.dtype, device=owner.device))
            momenta[whole] = torch.zeros_like(whole)
            self._cut.append((_Cut(fragment, whole, momenta[whole], others), owner, offset))
        self._muon = torch.optim.Muon(list(momenta), momentum=momentum, adjust_lr_fn=RMS_AS_ADAMW) if momenta else None
        for whole, buffer in momenta.items():
            self._muon.state[whole]["momentum_buffer"] = buffer  # type: ignore[union-attr]  # there where any is

    def step(self, lr: float, weight_decay: float) -> None:
        for whole, owner, offset in self._whole:
            whole.grad = _gradient(owner, offset, whole.numel()).view(whole.shape)
        for cut, owner, offset in self._cut:
            cut.whole.grad = torch.empty_like(cut.whole)
            cut.own(cut.whole.grad).copy_(_gradient(owner, offset, cut.fragment.length))
            cut.own(cut.whole.data).copy_(cut.fragment.master)
        self._exchange([(cut, cut.whole.grad) for cut, *_ in self._cut if cut.whole.grad is not None])
        if self._muon is None:
            return
        self._muon.param_groups[0].update(lr=lr, weight_decay=weight_decay)
        self._muon.step()
        self._muon.zero_grad()
        for cut, *_ in self._cut:
            cut.fragment.master.copy_(cut.own(cut.whole.data))
            cut.fragment.moments[MOMENTUM].copy_(cut.own(cut.momentum))

    def settle(self) -> None:
        for cut, *_ in self._cut:
            cut.own(cut.momentum).copy_(cut.fragment.moments[MOMENTUM])
        self._exchange([(cut, cut.momentum) for cut, *_ in self._cut])

    def _exchange(self, wholes: Sequence[tuple[_Cut, Tensor]]) -> None:
        """Fill the parts of each tensor that other ranks hold. All ranks go through the matrices in one order."""
        group, calls = self._context.device_group, []
        for cut, whole in wholes:
            for rank, start, length in cut.others:
                calls.append(dist.P2POp(dist.isend, cut.own(whole), rank, group))
                calls.append(dist.P2POp(dist.irecv, whole.view(-1).narrow(0, start, length), rank, group))
        for work in dist.batch_isend_irecv(calls) if calls else []:
            work.wait()


def _place(fragment: Fragment) -> tuple[str, int, int]:
    return fragment.name, fragment.start, fragment.length


def _owner(owners: Sequence[Tensor], master: Tensor) -> tuple[Tensor, int]:
    """The tensor that `master` is a part of, and where it begins there."""
    for owner in owners:
        offset = int(master.storage_offset() - owner.storage_offset())
        same = owner.untyped_storage().data_ptr() == master.untyped_storage().data_ptr()
        if same and offset >= 0 and offset + master.numel() <= owner.numel():
            return owner, offset
    raise ValueError("a matrix lies in none of its group's tensors")


def _gradient(owner: Tensor, offset: int, length: int) -> Tensor:
    assert owner.grad is not None, "DeepSpeed steps with gradients"
    return owner.grad.view(-1).narrow(0, offset, length)


def build_optimizer(
    groups: Sequence[ParameterGroup], parameters: dict[str, nn.Parameter], settings: OptimizerConfig
) -> GuardedAdamW | GuardedMuon:
    plain: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay} for group in groups
    ]
    if settings.name == "adamw":
        return GuardedAdamW(plain, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)
    named = [
        {**entry, "muon": group.muon, "names": frozenset(group.names)}
        for entry, group in zip(plain, groups, strict=True)
    ]
    return GuardedMuon(named, settings)
