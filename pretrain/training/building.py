"""A run's modules before DeepSpeed has them: the task with its first values, and the teacher's empty twin.

Under ZeRO-3 with more than one rank both are made on the meta device, and the task is cut as it gets its values
(partition.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from pretrain.configuration import RunConfig
from pretrain.training.engine import compute_dtype, settings_for
from pretrain.training.fragments import Fragment
from pretrain.training.partition import partition, partitions
from pretrain.training.processes import Processes, seed_step


@dataclass
class Built:
    """exact: fp32 values of given weights, name -> (start, flat values): DeepSpeed's masters start rounded."""

    task: Any
    teacher: nn.Module | None
    exact: dict[str, tuple[int, Tensor]] = field(default_factory=dict)

    def start_exactly(self, held: list[Fragment]) -> None:
        """The given weights, unrounded, into the masters; once."""
        for fragment in held:
            if fragment.name in self.exact:
                first, values = self.exact[fragment.name]
                fragment.master.copy_(values.narrow(0, fragment.start - first, fragment.length))
        self.exact = {}


def build(
    config: RunConfig,
    make: Callable[[], Any],
    initialize: Callable[[nn.Module], None] | None,
    processes: Processes,
) -> Built:
    """make: gives the task, with random values of the current generator; alike on every rank. initialize: writes given
    weights into it. Raises UserError, on every rank, where one of them does.
    """
    seed_step(config.training.seed, -1, 0)  # the same initial weights on every rank
    wants_teacher = config.training.ema.enabled
    if not partitions(config.training.zero_stage, processes):
        task = make()
        exact = {}
        if initialize is not None:
            initialize(task)
            exact = {name: (0, p.detach().clone().view(-1)) for name, p in task.named_parameters()}
        return Built(task, task.teacher() if wants_teacher else None, exact)
    with torch.device("meta"):
        task = make()
        teacher = task.teacher() if wants_teacher else None
    source, problem = None, None
    if processes.leader:
        try:
            source = make()
            if initialize is not None:
                initialize(source)
        except UserError as error:
            problem = str(error)
    if (problem := processes.gather(problem)[0]) is not None:
        raise UserError(problem)
    exact = partition(
        task,
        settings_for(task, config, processes),
        processes,
        compute_dtype(config),
        source=source,
        exact=initialize is not None,
    )
    return Built(task, teacher, exact)
