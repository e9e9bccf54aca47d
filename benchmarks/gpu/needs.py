"""Which packages a step does without: the end of a step that this machine lacks one for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from record import not_here

OURS = ("benchmarks", "data_pipeline", "dcnv3", "launch", "pretrain")


@contextmanager
def packages(step: str) -> Iterator[None]:
    """Around all of a step's work: a package of others that is missing ends the step as "not here"."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OURS:
            raise
        not_here(step, f"{error.name} is not installed")
