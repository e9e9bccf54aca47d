"""A rank of the real task over the real reader; a script, given pairs of configuration and output, run one by one.

FAKE_LINEAGE and FAKE_SLEEP mean what they mean in training_fakes.py, at the moment when training takes a batch.
FAKE_COMPILER names what compiles in the place of inductor, which would take minutes.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.reading.config import DataConfig
from pretrain.configuration import parse_config
from pretrain.models import compilation
from pretrain.tasks.pretraining.task import Pretraining
from pretrain.tasks.task import ReaderOptions
from pretrain.training import run
from pretrain.training.distributed import leave


class WatchedReader:
    """The reader; it writes down every batch that it gives: step, micro, (position, sum of the pixels) of each row."""

    def __init__(self, reader: Any, rank: int) -> None:
        self._reader, self._rank = reader, rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def batches(self, start: int, segments: Any = ()) -> Iterator[Any]:
        for batch in self._reader.batches(start, segments):
            if lineage := os.environ.get("FAKE_LINEAGE"):
                rows = zip(batch.positions.tolist(), batch.views.sum((1, 2, 3, 4)).tolist(), strict=True)
                with open(f"{lineage}.{self._rank}", "a") as file:
                    file.write(json.dumps([batch.step, batch.micro, list(rows)]) + "\n")
            time.sleep(float(os.environ.get("FAKE_SLEEP", 0)))
            yield batch


class Watched(Pretraining):
    def open_reader(self, data: DataConfig, options: ReaderOptions) -> WatchedReader:
        return WatchedReader(super().open_reader(data, options), options.rank)


if __name__ == "__main__":
    if backend := os.environ.get("FAKE_COMPILER"):
        compilation.compile_regions = partial(compilation.compile_regions, backend=backend)
    for described, where in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        raw = yaml.safe_load(Path(described).read_text())
        raw["task"]["name"] = "real_rank:Watched"
        if code := run(parse_config(raw), where):
            leave(code)
    leave(0)
