"""Decides which positions of the global batches a rank reads."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.hashing import Integers


def rows_per_rank(batch_size: int, accumulation: int, world_size: int) -> int:
    """Returns the samples of one micro-batch on one rank. Raises UserError where the global batch does not divide."""
    parts = accumulation * world_size
    if batch_size % parts:
        whole = batch_size // parts * parts
        near = f"{whole} or {whole + parts}" if whole else f"{parts}"
        raise UserError(
            f"training.batch_size {batch_size} is not divisible by {world_size} processes x training.accumulation "
            f"{accumulation} = {parts}: take {near}, or another number of processes"
        )
    return batch_size // parts


@dataclass(frozen=True)
class Share:
    """One rank's part of the global batches: step s is positions [s B, (s + 1) B), micro-batch a of it the a-th run of
    B / accumulation, and a rank's share the rank-th run of that."""

    batch_size: int
    accumulation: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        rows_per_rank(self.batch_size, self.accumulation, self.world_size)
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank {self.rank} is not below the world size {self.world_size}")

    @property
    def rows(self) -> int:
        """Returns the samples of one micro-batch on one rank."""
        return rows_per_rank(self.batch_size, self.accumulation, self.world_size)

    def positions(self, step: int, micro: int) -> Integers:
        """Returns the global positions of this rank's rows: int64 [rows]."""
        first = step * self.batch_size + (micro * self.world_size + self.rank) * self.rows
        return np.arange(first, first + self.rows, dtype=np.int64)
