"""What a task wants of each sample besides its views: the seam between reading and the tasks.

    worker    layout -> arrays;  a row: views drawn, `write`;  a batch: `finish`
    trainer   `collate`: arrays and extras -> typed targets, in `Batch.targets`

Order, resume, bad samples and lineage know nothing of targets, so they are the same for every task.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.reading.storage.shards import RawSample
from data_pipeline.reading.workers.memory import Arrays, Layout


class TargetSource(NamedTuple):
    """What targets may use of one source of the mixture."""

    captions: bool
    labels: bool
    classes: NDArray[np.int64] | None = None  # the source's category -> the mixture's; None: the source's own numbers

    def category(self, label: int | None) -> int:
        """Returns the category's number in the mixture, -1 where there is none."""
        if not self.labels or label is None:
            return -1
        if self.classes is None:
            return label
        return int(self.classes[label]) if label < len(self.classes) else -1


class Targets(Protocol):
    """The typed targets of one batch."""

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Returns the targets with `change` applied to every tensor: moved to a device, or pinned."""


T = TypeVar("T", bound=Targets)
T_co = TypeVar("T_co", bound=Targets, covariant=True)


class TargetSpec(Protocol[T_co]):
    """Makes a task's targets. Pickled to workers, so that a spec holds no open file and no lambda.

    A sample whose targets cannot be made is a bad sample: `write` raises BadSample, and the reader replaces and records
    the whole sample. What fits no array of fixed shape (captions, masks as RLE) is returned as a row's extra.
    """

    @property
    def members(self) -> tuple[str, ...]:
        """Members to read besides the image, as the sidecar names them: "json" has json_offset and json_size."""

    def layout(self, rows: int) -> Layout:
        """Lists the arrays of a batch of `rows`, padded where samples differ (boxes); not named "views" or "crops"."""

    def write(self, row: int, sample: RawSample, source: TargetSource, crops: np.ndarray, arrays: Arrays) -> object:
        """Writes a sample's targets to `row` of `arrays`, which hold old values; returns the row's extra.

        crops: float32 [V, 6], where each view lies in the image (see `Batch`), for targets that move with the pixels.
        """

    def incomplete(self, sample: RawSample, source: TargetSource) -> str:
        """Returns the reason to record where the sample lacks something that these targets would use; else ""."""

    def finish(self, extras: Sequence[object], arrays: Arrays) -> None:
        """Completes a batch in the worker, after all rows are written: work that is faster for many rows at once."""

    def collate(self, arrays: Arrays, extras: Sequence[object]) -> T_co:
        """Returns the batch's typed targets, over the memory of `arrays`."""
