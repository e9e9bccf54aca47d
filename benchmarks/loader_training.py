"""What reading costs training: the same run on real batches and on the same batches held in memory.

    python benchmarks/loader_training.py [CONFIG] --set SHARDS [--blocks 10] [--steps 4] [KEY=VALUE ...]

The whole training loop runs once; blocks of a few steps take turns: one on batches as the reader gives them, one on the
batches of the block before, held in memory. A ratio is of two blocks that follow one another, by wall time and by CPU
time, which judges where reading and training share a core: other work on the machine then matters little. For more
than one process set RANK, WORLD_SIZE and the rest, and BENCHMARK_FOLDER to an empty folder that they share. With
`data.workers` above 0 the workers would go on reading during the blocks in memory: those begin only when all that is
read ahead is read, and a real block is made longer than that, so that it pays for what it uses. Without --set, the
embedded set is made first, as the demo makes it.
Results: benchmarks/results/loader_training.json. Ends with 1 below the limit.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import machine

from data_pipeline.reading import Batch, DataConfig
from data_pipeline.reading.order.course import Segment
from pretrain.configuration import RunConfig, load_config
from pretrain.tasks.pretraining.task import Pretraining
from pretrain.tasks.task import ReaderOptions
from pretrain.training.distributed import DistributedContext, join
from pretrain.training.logging.record import environment
from pretrain.training.rank import run

LIMIT = 0.95
WARM_PAIRS = 2


class Alternating:
    """The run's reader; every second block of steps it gives the batches of the block before once more."""

    def __init__(self, reader: Any, config: RunConfig, processes: DistributedContext, steps: int) -> None:
        self.reader, self.config, self.processes = reader, config, processes
        self.steps = max(steps, 3 * config.data.workers * config.data.prefetch)
        self.real: list[tuple[float, float]] = []  # wall and CPU seconds of a step
        self.held: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)

    def batches(self, start: int, segments: Sequence[Segment] = ()) -> Iterator[Batch]:
        stream = self.reader.batches(start, segments)
        count = self.steps * self.config.training.accumulation
        while True:
            kept = []
            mark = self._now()
            for _ in range(count):
                batch = next(stream)
                kept.append(batch)
                yield batch
            self.real.append(self._since(mark))
            time.sleep(1.0 if self.config.data.workers else 0.0)  # for the workers to read ahead
            mark = self._now()
            yield from kept
            self.held.append(self._since(mark))

    def _now(self) -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.processes.barrier()
        return time.perf_counter(), time.process_time()

    def _since(self, mark: tuple[float, float]) -> tuple[float, float]:
        wall, cpu = ((now - then) / self.steps for now, then in zip(self._now(), mark, strict=True))
        return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--set", type=Path)
    parser.add_argument("--blocks", type=int, default=10, help="of each kind")
    parser.add_argument("--steps", type=int, default=4, help="of a block")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loader_training.json")
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_intermixed_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not (chosen.set and "BENCHMARK_FOLDER" in os.environ):
        parser.error("several processes need --set, and BENCHMARK_FOLDER naming an empty folder that they share")
    about = machine()
    made: list[Any] = []

    class Alternated(Pretraining):
        def open_reader(self, data: DataConfig, options: ReaderOptions) -> Alternating:
            inner, processes = super().open_reader(data, options), join(3600.0)
            made.extend([Alternating(inner, config, processes, chosen.steps), processes])
            return made[0]  # type: ignore[no-any-return]

    with tempfile.TemporaryDirectory() as temporary:
        shared = Path(os.environ.get("BENCHMARK_FOLDER", temporary))
        shards = chosen.set or _embedded(shared / "shards")
        config = load_config(chosen.config, [f"data.sources.0.path={shards}", *chosen.overrides])
        block = max(chosen.steps, 3 * config.data.workers * config.data.prefetch)
        config.schedule.steps = 2 * chosen.blocks * block + 1
        config.schedule.epochs = None
        config.schedule.warmup_steps = 1
        config.checkpoint.every_steps = None
        config.training.log_every = config.schedule.steps + 1
        run(config.model_copy(update={"task": Alternated(**config.task.model_dump())}), shared / "run")
    if int(os.environ.get("RANK", 0)):
        return
    alternating, processes = made
    pairs = list(zip(alternating.real, alternating.held, strict=False))[WARM_PAIRS:]
    clock = "CPU" if processes.device.type == "cpu" and not config.data.workers else "wall"
    result: dict[str, Any] = {"limit": LIMIT, "judged by": f"{clock} time"}
    for number, name in enumerate(("wall", "CPU")):
        ratios = [held[number] / real[number] for real, held in pairs]
        result[f"by {name} time"] = {
            "throughput, share of that on batches in memory": round(statistics.median(ratios), 4),
            "pairs of blocks": [round(ratio, 4) for ratio in ratios],
            "ms a step, real batches": round(1e3 * statistics.median(real[number] for real, _ in pairs), 1),
            "ms a step, in memory": round(1e3 * statistics.median(held[number] for _, held in pairs), 1),
        }
    result |= {
        "configuration": chosen.config,
        "overrides": chosen.overrides,
        "workers": config.data.workers,
        "batch": config.training.batch_size,
        "steps of a block": alternating.steps,
    }
    found = environment(processes.world_size, processes.device.type)
    result["machine"] = about | {key: found[key] for key in ("ranks", "device", "packages")}
    print(json.dumps(result, indent=1))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(result[f"by {clock} time"]["throughput, share of that on batches in memory"] < LIMIT)


def _embedded(folder: Path) -> Path:
    from data_pipeline.preparation.sources import openmoji
    from pretrain.demo.walk import DRAWINGS_A_CONCEPT

    return openmoji.build_openmoji(folder, drawings_a_concept=DRAWINGS_A_CONCEPT)["train"]


if __name__ == "__main__":
    main()
