"""Worker processes: nothing waits for ever, whatever the size of a batch."""

import faulthandler
from collections.abc import Iterator

import numpy as np
import pytest

from data_pipeline.hashing import Integers
from data_pipeline.reading.workers.builder import Filled
from data_pipeline.reading.workers.memory import Arrays
from data_pipeline.reading.workers.pool import WorkerPool

ROWS, AHEAD = 50_000, 32


class Talkative:
    """Its answers are larger than a pipe, as captions of many rows are; so would be the positions of its tasks."""

    def fill(self, positions: Integers, arrays: Arrays) -> Filled:
        arrays["labels"][:] = positions[0]
        filled = Filled.empty(len(positions))
        filled.extras = [f"caption of {position}" for position in positions.tolist()]
        return filled


@pytest.fixture
def impatient() -> Iterator[None]:
    """A deadlock ends the tests with all stacks, instead of holding them up."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.usefixtures("impatient")
def test_many_tasks_ahead_and_large_answers_do_not_block_each_other() -> None:
    pool = WorkerPool(
        Talkative(),  # type: ignore[arg-type]
        {"labels": ((1,), np.int64)},
        workers=1,
        prefetch=AHEAD,
        start_method="fork",
    )
    tasks = ((number, np.arange(number * ROWS, (number + 1) * ROWS, dtype=np.int64)) for number in range(AHEAD + 4))
    for number, (name, positions, arrays, filled) in enumerate(pool.run(tasks)):
        assert name == number and arrays["labels"][0] == positions[0] == number * ROWS
        assert filled.extras[-1] == f"caption of {positions[-1]}"
        if number == 3:
            break
    pool.close()
