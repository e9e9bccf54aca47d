"""What a rank holds of each parameter, as flat pieces, whatever the ZeRO stage.

    parameter "image.stem.conv1.weight", shape [32, 3, 3, 3], 864 values
        rank 0: start 0,   length 500      master, exp_avg, exp_avg_sq  (1-D fp32 views of the optimizer's storage;
                                           of Muon: momentum_buffer)
        rank 1: start 500, length 364

Stage 0 keeps everything on every rank: there each rank *holds* all and *owns* one slice (what it saves, and whose EMA
it keeps). Stages 1 and 2 cut flat groups of parameters; stage 3 cuts every parameter. This file is the only one that
knows how.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.training.zero.file_memory import zeros

DeepSpeedEngine = Any  # which has no types
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
MOMENTUM = "momentum_buffer"  # of Muon


@dataclass(frozen=True)
class Fragment:
    """Values [start, start + length) of the flattened parameter `name`."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    master: Tensor
    moments: dict[str, Tensor] = field(default_factory=dict)  # empty for a frozen parameter
    replicated: bool = False  # the same on every rank

    def narrow(self, start: int, length: int) -> "Fragment":
        """The part [start, start + length) of the flattened parameter."""
        offset = start - self.start
        moments = {kind: tensor.narrow(0, offset, length) for kind, tensor in self.moments.items()}
        return Fragment(self.name, self.shape, start, length, self.master.narrow(0, offset, length), moments)

    @property
    def trainable(self) -> bool:
        return bool(self.moments)

    def kinds(self) -> Iterator[tuple[str, Tensor]]:
        yield "param", self.master
        yield from self.moments.items()


def share(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """(start, length) of a rank's even slice of `numel` values; the last ones may be shorter or empty."""
    size = -(-numel // world_size)
    start = min(numel, rank * size)
    return start, min(numel, start + size) - start


def new_state(optimizer: torch.optim.Optimizer, masters: Iterable[Tensor], folder: Path | None) -> None:
    """The optimizer's state at step 0 for every master tensor, made now. folder: where the moments lie in files."""
    of_muon = {id(p) for group in optimizer.param_groups if group.get("muon") for p in group["params"]}
    for master in masters:
        state = optimizer.state[master]
        if id(master) in of_muon:
            state[MOMENTUM] = zeros(master.shape, master, folder)
            continue
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)  # where a fused step reads it
        for kind in MOMENTS:
            state[kind] = zeros(master.shape, master, folder)


def held_fragments(
    engine: DeepSpeedEngine, module: nn.Module, folder: Path | None
) -> tuple[list[Fragment], list[Tensor]]:
    """All that this rank holds (ordered by the module's parameters), and the master tensors the optimizer steps.

    engine: a DeepSpeedEngine around `module`, whose base optimizer is one of optimizer.py.
    """
    stage = engine.zero_optimization_stage()
    base = engine.basic_optimizer
    if stage == 3:
        return _stage3(engine, module, base, folder)
    if stage in (1, 2):
        return _stage12(module, base, folder)
    return _stage0(engine, module, base, folder)


def _moments(base: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    return {kind: value.view(-1) for kind, value in base.state[master].items() if kind != "step"}


def _stage0(
    engine: DeepSpeedEngine, module: nn.Module, base: torch.optim.Optimizer, folder: Path | None
) -> tuple[list[Fragment], list[Tensor]]:
    masters: dict[int, Tensor] = {}
    if hasattr(engine.optimizer, "fp32_groups"):  # bf16 and fp16: the optimizer steps fp32 copies
        for low, high in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            masters.update({id(p): master for p, master in zip(low, high, strict=True)})
    else:
        masters = {id(p): p for group in base.param_groups for p in group["params"]}
    new_state(base, masters.values(), folder)
    fragments = []
    for name, parameter in module.named_parameters():
        master = masters.get(id(parameter))
        moments = {} if master is None else _moments(base, master)
        value = (parameter if master is None else master).detach().view(-1)
        fragments.append(Fragment(name, tuple(parameter.shape), 0, value.numel(), value, moments, replicated=True))
    return fragments, list(masters.values())


def _stage12(
    module: nn.Module, base: torch.optim.Optimizer, folder: Path | None
) -> tuple[list[Fragment], list[Tensor]]:
    flats = [group["params"][0] for group in base.param_groups]
    new_state(base, flats, folder)
    of_storage = {flat.untyped_storage().data_ptr(): flat for flat in flats}
    fragments = []
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        if not hasattr(parameter, "_hp_mapping"):  # frozen
            value = parameter.detach().view(-1)
            fragments.append(Fragment(name, shape, 0, value.numel(), value, replicated=True))
        elif parameter._hp_mapping is not None:  # None: all of it is on other ranks
            mapping = parameter._hp_mapping
            flat = of_storage[mapping.hp_fragment.untyped_storage().data_ptr()]
            inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
            master = flat.detach().narrow(0, inside.start, inside.numel)
            moments = {k: v.narrow(0, inside.start, inside.numel) for k, v in _moments(base, flat).items()}
            fragments.append(Fragment(name, shape, outside.start, outside.numel, master, moments))
    return fragments, flats


def _stage3(
    engine: DeepSpeedEngine, module: nn.Module, base: torch.optim.Optimizer, folder: Path | None
) -> tuple[list[Fragment], list[Tensor]]:
    zero = engine.optimizer
    flats = list(zero.fp32_partitioned_groups_flat)
    new_state(base, flats, folder)
    rank = torch.distributed.get_rank()
    fragments = []
    for name, named in module.named_parameters():
        parameter: Any = named  # with DeepSpeed's ds_* attributes
        shape, numel, part = tuple(parameter.ds_shape), parameter.ds_numel, parameter.ds_tensor.ds_numel
        start = min(numel, rank * part)
        length = min(numel, start + part) - start
        if length == 0:
            continue
        if not parameter.requires_grad:
            value = parameter.ds_tensor.detach().view(-1).narrow(0, 0, length)
            fragments.append(Fragment(name, shape, start, length, value))
            continue
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        flat = flats[group]
        master = flat.detach().narrow(0, offset, length)
        moments = {k: v.narrow(0, offset, length) for k, v in _moments(base, flat).items()}
        fragments.append(Fragment(name, shape, start, length, master, moments))
    return fragments, flats


def owned_fragments(held: Iterable[Fragment], *, rank: int, world_size: int) -> list[Fragment]:
    """What this rank answers for: of what every rank holds, each takes its slice."""
    owned = []
    for fragment in held:
        if not fragment.replicated:
            owned.append(fragment)
            continue
        start, length = share(fragment.length, rank, world_size)
        if length:
            owned.append(fragment.narrow(start, length))
    return owned


@torch.no_grad()
def publish(engine: DeepSpeedEngine, module: nn.Module) -> None:
    """Masters were written from outside: bring every rank's compute weights up to date. Collective at stages 1 to 3."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        zero._partition_all_parameters()
        zero.invalidate_secondary_tensor()  # copies of a secondary partition are of the weights before
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif stage in (1, 2):
        zero.update_lp_params()
    elif hasattr(zero, "fp32_groups"):
        for low, high in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
            torch._foreach_copy_(list(low), list(high))
