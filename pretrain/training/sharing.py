"""Ranks that share the work of an evaluation: each reads its part of the set, all have the whole result.

with shared_by(context): evaluate(...)        the same call on every rank
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from pretrain.training.distributed import DistributedContext, join

HOURS = 24  # a rank may wait as long for another that reads slowly

_ALONE = DistributedContext(0, 1, torch.device("cpu"), None)
_current: ContextVar[DistributedContext] = ContextVar("ranks that share an evaluation", default=_ALONE)


@contextmanager
def shared_by(context: DistributedContext) -> Iterator[None]:
    """Sets that are read within are shared by the ranks of `context`, all of which must read the same ones."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def shared_by_ranks() -> Iterator[DistributedContext]:
    """The ranks that a launcher has started meet and share; a process alone stays alone. All leave together."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield _ALONE
        return
    context = join(HOURS * 3600)
    with shared_by(context):
        yield context
    context.barrier()


def sharing() -> DistributedContext:
    """The ranks that share the work now; a single one where nothing else was said."""
    return _current.get()
