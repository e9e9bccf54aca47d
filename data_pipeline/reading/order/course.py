"""Decides which samples the steps of a run are, where batch size or weights of the mixture change on the way.

    segment from step     0        1,000      5,000
    global batch          256      512        512
    positions from        0        256,000    2,304,000        they run on: none is missed, none is read twice
    weights               3 : 1    3 : 1      1 : 1

A segment begins its mixture anew at its first position, and each source goes on from the sample that it had come to. So
every position of every segment means one sample, for ever.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.hashing import Integers
from data_pipeline.reading.order.mixture import Mixture


@dataclass(frozen=True)
class Segment:
    """From `step` on: the global batch, and the weight of each source."""

    step: int
    batch_size: int
    weights: tuple[float, ...]


def go_on(earlier: Sequence[Segment], step: int, batch_size: int, weights: Sequence[float]) -> tuple[Segment, ...]:
    """The segments of a run that goes on from `step` with this batch and these weights. earlier: those of the
    checkpoint that it goes on from; what they say of later steps is dropped.
    """
    kept = [segment for segment in earlier if segment.step < step]
    now = Segment(step if kept else 0, batch_size, tuple(weights))
    if kept and (kept[-1].batch_size, kept[-1].weights) == (now.batch_size, now.weights):
        return tuple(kept)
    return (*kept, now)


def samples_before(segments: Sequence[Segment], step: int) -> int:
    """Counts the samples that a run has read when `step` begins."""
    ends = [*(segment.step for segment in segments[1:]), step]
    parts = zip(segments, ends, strict=True)
    return sum(max(0, min(end, step) - segment.step) * segment.batch_size for segment, end in parts)


class Course:
    """segments: by step, the first one from step 0."""

    def __init__(self, segments: Sequence[Segment], *, seed: int) -> None:
        if not segments or segments[0].step != 0:
            raise ValueError("a course begins with a segment from step 0")
        self._segments = list(segments)
        self._mixtures = [Mixture(segment.weights, seed=seed) for segment in segments]
        self._firsts = [0]  # positions
        self._given = [[0] * len(segments[0].weights)]  # samples of each source before the segment
        for before, mixture, after in zip(segments, self._mixtures, segments[1:], strict=False):
            length = (after.step - before.step) * before.batch_size
            self._firsts.append(self._firsts[-1] + length)
            given = zip(self._given[-1], mixture.consumed(length), strict=True)
            self._given.append([old + new for old, new in given])

    def _segment(self, step: int) -> int:
        return bisect_right([segment.step for segment in self._segments], step) - 1

    def first(self, step: int) -> int:
        """Returns the first position of a step's global batch: so many samples were read before it."""
        number = self._segment(step)
        segment = self._segments[number]
        return self._firsts[number] + (step - segment.step) * segment.batch_size

    def batch_size(self, step: int) -> int:
        """Counts the samples of a step."""
        return self._segments[self._segment(step)].batch_size

    def step(self, position: int) -> int:
        """Returns the step that reads `position`."""
        number = bisect_right(self._firsts, position) - 1
        segment = self._segments[number]
        return segment.step + (position - self._firsts[number]) // segment.batch_size

    def locate(self, positions: Integers) -> tuple[Integers, Integers]:
        """Maps global positions, int64 [n], to source and running index in that source, int64 [n] each."""
        numbers = np.searchsorted(self._firsts, positions, side="right") - 1
        sources, indices = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(numbers):
            mine = numbers == number
            source, index = self._mixtures[number].locate(positions[mine] - self._firsts[number])
            sources[mine], indices[mine] = source, index + np.asarray(self._given[number], dtype=np.int64)[source]
        return sources, indices

    def consumed(self, position: int) -> list[int]:
        """Counts the samples that each source gives to the positions before `position`."""
        number = max(0, bisect_right(self._firsts, position) - 1)
        inside = self._mixtures[number].consumed(position - self._firsts[number])
        return [before + count for before, count in zip(self._given[number], inside, strict=True)]
