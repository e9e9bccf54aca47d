"""What the training loop costs over bare DeepSpeed, and how long a checkpoint holds up a step.

    python benchmarks/training_overhead.py [CONFIG] [--blocks 12] [--steps 5] [--out FILE] [KEY=VALUE ...]

Two engines of one configuration take turns, in blocks of a few steps, so that a change of the load meets both:
ours is the whole loop (schedule, agreement of the ranks, judgement, average, teacher, metrics, logging as often as the
configuration says); bare is DeepSpeed's forward, backward and step on the same batch with the same targets of a teacher
that stands still. `average off` is the same without EMA, for the share of it. Batches are made up beforehand; nothing
is decoded. A checkpoint is made in every other block, after its first step: `stall` is the time inside the call,
`extra` what blocks with one take longer than those before and after them, the writing in the background included. For
more than one process set RANK, WORLD_SIZE and the rest, and BENCHMARK_FOLDER to an empty folder that they share.
Results: benchmarks/results/training_overhead.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import machine

from data_pipeline.reading import Batch, ImageTextTargets, Targets
from data_pipeline.reading.config import DataConfig
from data_pipeline.reading.faults import FaultLog
from data_pipeline.reading.order.course import Segment
from pretrain.configuration import RunConfig, load_config
from pretrain.tasks.module import StepKeys
from pretrain.tasks.pretraining.task import Pretraining
from pretrain.tasks.task import ReaderOptions, module_of
from pretrain.training.checkpoint.checkpointer import Checkpointer
from pretrain.training.distributed import DistributedContext, join
from pretrain.training.logging.record import environment
from pretrain.training.parameter_groups import parameter_groups
from pretrain.training.rank import run
from pretrain.training.zero.engine import Engine, settings_for

CLASSES, WARM_BLOCKS = 9, 2


def made_up_batch(config: RunConfig, world_size: int) -> Batch[Targets]:
    rows = config.training.batch_size // config.training.accumulation // world_size
    size, views = config.data.image_size, config.data.views
    generator = torch.Generator().manual_seed(0)
    assert isinstance(config.task, Pretraining)
    tokens = torch.randint(1, config.task.text.vocab_size - 1, (rows, config.data.context_length), generator=generator)
    tokens[:, -1] = config.task.text.vocab_size - 1
    return Batch(
        step=0,
        micro=0,
        positions=torch.arange(rows),
        views=torch.randint(0, 256, (rows, views, size, size, 3), generator=generator, dtype=torch.uint8),
        crops=torch.tensor([0.0, 0.0, size, size, 0.0, size]).expand(rows, views, 6).contiguous(),
        targets=ImageTextTargets(
            tokens=tokens,
            has_text=torch.ones(rows, dtype=torch.bool),
            labels=torch.randint(0, CLASSES, (rows,), generator=generator),
            has_label=torch.ones(rows, dtype=torch.bool),
        ),
    )


class Bare:
    """DeepSpeed and nothing else."""

    def __init__(self, config: RunConfig, processes: DistributedContext) -> None:
        self.config, self.module = config, module_of(config, classes=CLASSES)
        self.teacher = self.module.teacher()
        shapes = {name: tuple(p.shape) for name, p in self.module.named_parameters()}
        groups = parameter_groups(shapes, config.optimizer, self.module.backbone())
        training, optimizer = config.training, config.optimizer
        settings = settings_for(self.module, training, optimizer.clip_grad, config.deepspeed, processes)
        built = Engine(  # as training builds it; stepped by DeepSpeed alone
            self.module,
            groups,
            settings,
            optimizer=optimizer,
            training=training,
            compiled=False,
            context=processes,
        )
        self.engine = built._engine
        self.batch = made_up_batch(config, processes.world_size).to(processes.device)

    def step(self, number: int) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 1e-4
        for micro in range(self.config.training.accumulation):
            keys = StepKeys(0, number, micro)
            teacher = self.teacher
            targets = self.module.teacher_targets(teacher, self.batch, keys) if teacher is not None else None
            self.engine.backward(self.engine(self.batch, keys, targets, False).total)
            self.engine.step()


class Interleaving:
    """A reader that, at every block of our loop, lets the bare engine run one, and keeps both times. A block begins
    `lead` steps before a multiple of its length.
    """

    epoch_samples, num_classes, fingerprint = 10**6, CLASSES, "made up"
    classes, sources = None, ()

    def __init__(self, config: RunConfig, processes: DistributedContext, steps: int, lead: int = 0) -> None:
        self.processes, self.steps, self.lead = processes, steps, lead
        self.batch, self.bare = made_up_batch(config, processes.world_size), Bare(config, processes)
        self.accumulation = config.training.accumulation
        self.faults = FaultLog(0.01, None)
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def batches(self, start: int, _segments: Sequence[Segment] = ()) -> Iterator[Batch[Targets]]:
        step, mark = start, None
        while True:
            if (step + self.lead) % self.steps == 0:
                self._synchronize()
                if mark is not None:
                    self.ours.append((time.perf_counter() - mark) / self.steps)
                begin = time.perf_counter()
                for number in range(self.steps):
                    self.bare.step(step + number)
                self._synchronize()
                self.theirs.append((time.perf_counter() - begin) / self.steps)
                mark = time.perf_counter()
            for _ in range(self.accumulation):
                yield self.batch
            step += 1

    def _synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.processes.barrier()

    def has_labels(self) -> bool:
        return True

    def progress(self, step: int) -> dict[str, dict[str, float]]:
        return {}

    def close(self) -> None:
        pass


def interleaved(
    config: RunConfig, steps: int, output: Path, lead: int = 0
) -> tuple[Interleaving, list[dict[str, float]], list[Any]]:
    """Run; the reader with its times, what each save took of the loop, and the processes."""
    kept: list[Any] = []
    saves: list[dict[str, float]] = []
    save = Checkpointer.save

    class Interleaved(Pretraining):
        def open_reader(self, data: DataConfig, options: ReaderOptions) -> Interleaving:
            processes = join(3600.0)
            kept.extend([Interleaving(config, processes, steps, lead), processes])
            return kept[0]  # type: ignore[no-any-return]

    def timed(self: Checkpointer, step: int, state: dict[str, Any]) -> None:
        begin = time.perf_counter()
        save(self, step, state)
        saves.append({"step": step, "seconds": time.perf_counter() - begin})

    Checkpointer.save = timed  # type: ignore[method-assign]
    try:
        measured = config.model_copy(update={"task": Interleaved(**config.task.model_dump())})
        run(measured, output)
    finally:
        Checkpointer.save = save  # type: ignore[method-assign]
    return kept[0], saves, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="of a block")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_overhead.json")
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_intermixed_args()
    total = chosen.blocks * chosen.steps + 1
    common = [f"schedule.steps={total}", "schedule.warmup_steps=1", *chosen.overrides]
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "BENCHMARK_FOLDER" not in os.environ:
        parser.error("several processes need BENCHMARK_FOLDER, naming an empty folder that they share")
    about = machine()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(os.environ.get("BENCHMARK_FOLDER", folder))
        for name, extra in (
            ("whole", []),
            ("average off", ["training.ema.enabled=false", "task.preset=clip", "task.balance=null"]),
        ):
            config = load_config(chosen.config, [*common, *extra])
            config.checkpoint.every_steps = None
            reader, _, _ = interleaved(config, chosen.steps, shared / name.replace(" ", "-"))
            ours, bare = reader.ours[WARM_BLOCKS:], reader.theirs[WARM_BLOCKS : len(reader.ours)]
            ratios = [a / b for a, b in zip(ours, bare, strict=True)]
            result[name] = {
                "overhead_percent": 100 * (statistics.median(ratios) - 1),
                "overhead_percent_blocks": [100 * (ratio - 1) for ratio in ratios],
                "ours_ms": 1e3 * statistics.median(ours),
                "bare_ms": 1e3 * statistics.median(bare),
            }
        config = load_config(
            chosen.config, [*common, f"checkpoint.every_steps={2 * chosen.steps}", "checkpoint.keep=2"]
        )
        reader, saves, kept = interleaved(config, chosen.steps, shared / "saving", lead=1)
        # Block k runs from step (k + 1) * steps - 1 on, so that every second one holds a save, after its first step.
        blocks = [chosen.steps * seconds for seconds in reader.ours]
        extras = [
            blocks[k] - (blocks[k - 1] + blocks[k + 1]) / 2 for k in range(1, len(blocks) - 1, 2) if k >= WARM_BLOCKS
        ]
        step = statistics.median(reader.ours[0::2])
        stalls = [entry["seconds"] for entry in saves[1:-1]]  # the first makes the buffers, the last ends the run
        result["checkpoint"] = {
            "stall_ms": 1e3 * statistics.median(stalls),
            "first_stall_ms": 1e3 * saves[0]["seconds"],
            "step_ms": 1e3 * step,
            "stall_steps": statistics.median(stalls) / step,
            "extra_steps": statistics.median(extras) / step,
            "extra_steps_blocks": [extra / step for extra in extras],
            "megabytes": sum(
                f.stat().st_size for f in (shared / "saving" / "checkpoints").glob(f"step-{total:08d}/*")
            ) / 1e6,
        }  # fmt: skip
        processes: DistributedContext = kept[1]
    if rank:
        return
    print(f"overhead over bare DeepSpeed: {result['whole']['overhead_percent']:+.1f} %  "
          f"(average off: {result['average off']['overhead_percent']:+.1f} %)")  # fmt: skip
    print(f"a checkpoint holds a step up for {result['checkpoint']['stall_steps']:.2f} steps "
          f"({result['checkpoint']['stall_ms']:.0f} ms of {result['checkpoint']['step_ms']:.0f} ms); "
          f"with the writing it costs {result['checkpoint']['extra_steps']:+.2f} steps")  # fmt: skip
    found = environment(processes.world_size, processes.device.type)
    result["machine"] = about | {key: found[key] for key in ("ranks", "device", "packages")}
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
