"""A run's modules before DeepSpeed has them: the task's with its first values, and the teacher's empty twin.

Under ZeRO-3 with more than one rank both are made on the meta device, and the first is cut as it gets its values
(partition.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from pretrain.configuration.schema import TrainingConfig
from pretrain.tasks.module import TaskModule
from pretrain.training.distributed import DistributedContext, seed_step
from pretrain.training.zero.engine import compute_dtype
from pretrain.training.zero.fragments import Fragment
from pretrain.training.zero.partition import partition, partitions

Initialize = Callable[[TaskModule], None]


@dataclass
class Built:
    """exact: fp32 values of given weights, name -> (start, flat values): DeepSpeed's masters start rounded."""

    module: TaskModule
    teacher: nn.Module | None
    settings: dict[str, Any]
    exact: dict[str, tuple[int, Tensor]] = field(default_factory=dict)

    def start_exactly(self, held: list[Fragment]) -> None:
        """The given weights, unrounded, into the masters; once."""
        for fragment in held:
            if fragment.name in self.exact:
                first, values = self.exact[fragment.name]
                fragment.master.copy_(values.narrow(0, fragment.start - first, fragment.length))
        self.exact = {}


def build(
    make: Callable[[], TaskModule],
    settings_of: Callable[[nn.Module], dict[str, Any]],
    initialize: Initialize | None,
    *,
    training: TrainingConfig,
    context: DistributedContext,
) -> Built:
    """make: gives the module, with random values of the current generator; alike on every rank. settings_of: the
    DeepSpeed JSON of a module. initialize: writes given weights into it. Raises UserError, on every rank, where one of
    them does.
    """
    seed_step(training.seed, -1, 0)  # the same initial weights on every rank
    wants_teacher = training.ema.enabled
    if not partitions(training.zero_stage, context):
        module = make()
        exact = {}
        if initialize is not None:
            initialize(module)
            exact = {name: (0, p.detach().clone().view(-1)) for name, p in module.named_parameters()}
        return Built(module, module.teacher() if wants_teacher else None, settings_of(module), exact)
    with torch.device("meta"):
        module = make()
        teacher = module.teacher() if wants_teacher else None
    source, problem = None, None
    if context.leader:
        try:
            source = make()
            if initialize is not None:
                initialize(source)
        except UserError as error:
            problem = str(error)
    if (problem := context.gather(problem)[0]) is not None:
        raise UserError(problem)
    settings = settings_of(module)
    dtype = compute_dtype(training.precision)
    exact = partition(module, settings, context, dtype, source=source, exact=initialize is not None)
    return Built(module, teacher, settings, exact)
