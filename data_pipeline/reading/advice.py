"""Recommends `data.workers`, from what one core reads a second of the run's own shards."""

import math
import time
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.executors.processes import available
from data_pipeline.reading.config import DataConfig
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.streaming import check_streams
from data_pipeline.reading.targets import Targets, TargetSpec

_CHUNK = 32


def recommend_workers(
    config: DataConfig,
    targets: TargetSpec[Targets],
    *,
    samples_per_second: float | None = None,
    processes: int = 1,
    seconds: float = 5.0,
) -> dict[str, Any]:
    """Measures `seconds` of CPU time of reading in this process.

    Returns samples a second of one core, milliseconds a sample, cores for each process, and, for training that takes
    `samples_per_second` in each of `processes` on this machine, the workers each needs (with a quarter to spare) and
    the share of the time that reading in the training process (workers 0) would cost. Raises UserError for `pipe:`
    sources, which are read in the training process whatever `workers` says.
    """
    if check_streams(config):
        raise UserError(
            "pipe: sources are read in the training process, data.workers changes nothing for them; "
            "a run's data_wait_ms in metrics.jsonl says what reading costs"
        )
    alone = config.model_copy(update={"workers": 0, "max_bad_rate": 1.0})
    with Reader(alone, targets, batch_size=_CHUNK) as reader:
        reader.at(np.arange(_CHUNK, dtype=np.int64))  # opens shards, loads libraries
        count, began = 0, time.process_time()
        while (spent := time.process_time() - began) < seconds:
            count += _CHUNK
            reader.at(np.arange(count, count + _CHUNK, dtype=np.int64))
    rate = count / spent
    cores = available() / processes
    found: dict[str, Any] = {
        "samples_per_second_of_one_core": round(rate, 1),
        "milliseconds_per_sample": round(1000 / rate, 3),
        "cores_per_process": round(cores, 2),
    }
    if samples_per_second is not None:
        needed = math.ceil(1.25 * samples_per_second / rate)
        share = samples_per_second / rate
        found["share_of_time_with_workers_0"] = round(share / (1 + share), 4)
        found["workers_needed"] = needed
        # On as many cores as processes, a worker only takes turns with training.
        found["workers"] = min(needed, max(0, int(cores) - 1))
        found["enough"] = found["workers"] >= needed or share < 0.05
    return found
