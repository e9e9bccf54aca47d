"""Batch sizes and weights that change within a run, against counting sample by sample."""

import numpy as np
import pytest

from data_pipeline.reading.order.course import Course, Segment, go_on, samples_before
from data_pipeline.reading.order.mixture import Mixture

SEGMENTS = [
    Segment(0, 8, (3.0, 1.0)),
    Segment(100, 16, (3.0, 1.0)),
    Segment(130, 4, (1.0, 2.0)),
    Segment(400, 4, (1, 9)),
]


def counted(steps: int) -> list[list[tuple[int, int, int]]]:
    """For each step its (position, source, running index in the source), one after the other."""
    position, begun, given, found = 0, 0, [0, 0], []
    for step in range(steps):
        segment = [s for s in SEGMENTS if s.step <= step][-1]
        if segment.step == step:
            begun = position
        rows = []
        for _ in range(segment.batch_size):
            source = int(Mixture(segment.weights, seed=5).locate(np.array([position - begun]))[0][0])
            rows.append((position, source, given[source]))
            given[source] += 1
            position += 1
        found.append(rows)
    return found


def test_every_sample_of_a_source_is_read_in_turn_whatever_changes() -> None:
    course, steps = Course(SEGMENTS, seed=5), counted(420)
    for step, rows in enumerate(steps):
        positions = np.array([position for position, *_ in rows])
        assert course.first(step) == samples_before(SEGMENTS, step) == positions[0]
        assert course.batch_size(step) == len(rows) and course.step(int(positions[-1])) == step
    positions = np.array([position for rows in steps for position, *_ in rows])
    source, index = course.locate(positions)
    assert list(zip(source.tolist(), index.tolist(), strict=True)) == [(s, i) for rows in steps for _, s, i in rows]
    for step in (0, 1, 100, 117, 131, 419):
        given = [sum(s == source for rows in steps[:step] for _, s, _ in rows) for source in (0, 1)]
        assert course.consumed(course.first(step)) == given


def test_a_run_that_goes_back_beyond_a_change_makes_it_there() -> None:
    first = go_on((), 0, 8, (1.0,))
    assert first == (Segment(0, 8, (1.0,)),) == go_on(first, 5, 8, (1.0,))
    changed = go_on(first, 10, 16, (1.0,))
    assert changed == (*first, Segment(10, 16, (1.0,)))
    assert go_on(changed, 12, 16, (1.0,)) == changed
    assert go_on(changed, 4, 16, (1.0,)) == (*first, Segment(4, 16, (1.0,)))
    assert go_on(changed, 0, 16, (1.0,)) == (Segment(0, 16, (1.0,)),)
    with pytest.raises(ValueError, match="from step 0"):
        Course(changed[1:], seed=0)
