"""`internimage plan` against the allocator: predicted and seen bytes of training T, B and H at three batch sizes each.

    python benchmarks/gpu/model_memory.py T B H

The recipe of internimage_h_m3i_427m (the whole M3I-style objective, teacher, fp32 average, bf16; T and B under it by
name) with its ZeRO stage on one GPU, H with activation checkpointing as its recipe has it. Two steps of the product's
loop at each batch size over made-up batches, without checkpoints; seen is the allocator's peak above what stood before
the model was built. Without a GPU only the predictions are rows, of a tiny model.
"""

from __future__ import annotations

import argparse
import gc
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from needs import packages
from record import headline, record, small

if TYPE_CHECKING:
    from pretrain.configuration import RunConfig
    from pretrain.training.loop import Job
    from pretrain.training.processes import Processes

STEP = "memory"
RECIPE = "internimage_h_m3i_427m"
BATCHES = {"T": (32, 64, 128), "B": (16, 32, 64), "H": (16, 32, 64)}
CLASSES, STEPS, MEMORY_GB = 1000, 2, 80.0


class NoCheckpoints:
    """Stands where training saves: nothing is kept of these steps."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def save(self, step: int, state: dict[str, Any]) -> None:
        pass

    def poll(self) -> None:
        pass

    def due(self, step: int) -> bool:
        return False

    def wait_or_raise(self) -> bool:
        return True


def config_of(letter: str, batch: int, *, tiny: bool) -> RunConfig:
    from training_runs import TINY_MODEL

    from pretrain.configuration import load_config

    recompute = "blocks" if letter == "H" else "none"
    changes = {
        "data.sources": "[{path: made-up}]",
        "data.workers": 0,
        "model.num_classes": CLASSES,
        "model.recompute": recompute,
        "schedule.epochs": "null",
        "schedule.steps": STEPS,
        "schedule.warmup_steps": 0,
        "optimizer.lr_batch": "null",
        "optimizer.lr": 1e-6,
        "training.batch_size": batch,
        "training.log_every": STEPS,
    }
    if tiny:
        changes |= {"model.name": "custom", "data.image_size": 64, "objective.embed_dim": 64}
        changes |= {f"model.overrides.{name}": value for name, value in TINY_MODEL["overrides"].items()}
        changes |= {"objective.text.layers": 1, "objective.text.width": 64, "objective.text.heads": 2}
        changes |= {"objective.decoder.dim": 64, "objective.decoder.heads": 2}
    else:
        changes |= {"model.name": f"internimage_{letter.lower()}"}
    return load_config(RECIPE, [f"{key}={value if value is not None else 'null'}" for key, value in changes.items()])


def predicted(config: RunConfig) -> dict[str, Any]:
    """The plan's row of the configured stage, in bytes."""
    from launch.planning import plan_run

    plan = plan_run(config, gpus=1, memory_gb=MEMORY_GB, mfu=0.4, peak_tflops=989.0, epoch_samples=4096)
    row: dict[str, Any] = next(one for one in plan["stages"] if one["stage"] == config.training.zero_stage)
    return row


def job_of(config: RunConfig, processes: Processes, folder: Path) -> Job:
    """What the product's loop needs, built on the device."""
    from training_runs import MadeUpReader

    from pretrain.objectives import StepKeys, build_task
    from pretrain.training.account import Account
    from pretrain.training.building import build
    from pretrain.training.ema import Ema
    from pretrain.training.engine import Engine, full_shape
    from pretrain.training.interruption import Interruption
    from pretrain.training.loop import Job
    from pretrain.training.meter import Meter
    from pretrain.training.parameter_groups import parameter_groups
    from pretrain.training.policy import Policy
    from pretrain.training.rank import backbone_of
    from pretrain.training.record import Events
    from pretrain.training.schedule import make_plan
    from pretrain.training.teacher import build_teacher
    from pretrain.training.watchdog import Watchdog

    reader = MadeUpReader(config)
    with processes.device:
        built = build(config, partial(build_task, config, classes=CLASSES), None, processes)
    task = built.task
    shapes = {name: full_shape(p) for name, p in task.named_parameters() if p.requires_grad}
    engine = Engine(task, config, parameter_groups(shapes, config.optimizer, backbone_of(task)), processes)
    ema = Ema(engine.owned)
    events = Events(folder, 0)
    assert built.teacher is not None
    stand_in: Any = NoCheckpoints(folder)
    return Job(
        config=config,
        plan=make_plan(config, reader.epoch_samples),
        task=task,
        engine=engine,
        batches=reader.batches,
        make_keys=StepKeys,
        ema=ema,
        teacher=build_teacher(built.teacher, task.teacher_names(), engine, ema, processes),
        checkpointer=stand_in,
        policy=Policy(config.training.policy, folder, leader=True),
        processes=processes,
        meter=Meter(processes, config.training.batch_size, config.training.precision),
        interruption=Interruption(),
        watchdog=Watchdog(folder, 0, 600.0, 60.0, lambda kind, message: None),  # not started
        events=events,
        observe=lambda step, values: None,
        tick=lambda step: None,
        rewind=lambda step: None,
        account=Account(reader, processes, folder, 0),
    )


def rows_of(letter: str, processes: Processes, folder: Path, *, tiny: bool) -> list[float]:
    """Records a row a batch size; the ratios of seen to predicted."""
    from training_runs import MadeUpReader

    from pretrain.training.loop import train

    device, ratios = processes.device, []
    cuda = device.type == "cuda"
    sizes = (2, 4) if tiny else BATCHES[letter]
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device) if cuda else 0
    started = time.perf_counter()
    job = job_of(config_of(letter, sizes[0], tiny=tiny), processes, folder)
    states = torch.cuda.memory_allocated(device) - before if cuda else 0
    built_s = time.perf_counter() - started
    for batch in sizes:
        config = config_of(letter, batch, tiny=tiny)
        plan = predicted(config)
        row: dict[str, Any] = {"model": letter, "batch": batch, "zero_stage": config.training.zero_stage}
        row |= {"recomputed": config.model.recompute == "blocks", "predicted_gb": round(plan["total"] / 1e9, 3)}
        parts = ("parameters", "gradients", "optimizer", "average", "teacher", "buckets", "activations")
        row["predicted_parts_gb"] = {name: round(plan[name] / 1e9, 3) for name in parts}
        job.batches = MadeUpReader(config).batches
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        try:
            train(job, 0)
        except torch.OutOfMemoryError as error:
            record(STEP, row | {"error": str(error).splitlines()[0]})
            break
        row |= {"two_steps_s": round(time.perf_counter() - started, 2), "build_s": round(built_s, 1)}
        if cuda:
            seen = torch.cuda.max_memory_allocated(device) - before
            ratios.append(seen / plan["total"])
            row |= {"seen_gb": round(seen / 1e9, 3), "seen_over_predicted": round(ratios[-1], 3)}
            row |= {"states_seen_gb": round(states / 1e9, 3)}
            row |= {"reserved_gb": round(torch.cuda.max_memory_reserved(device) / 1e9, 3)}
        record(STEP, row)
    job.engine.close()
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(BATCHES))
    parser.add_argument("--small", action="store_true", help="a tiny model: does it run?")
    options = parser.parse_args()
    words = []
    with packages(STEP), TemporaryDirectory() as folder:
        from pretrain.training.processes import join

        processes = join(600.0)
        for letter in options.models:
            ratios = rows_of(letter, processes, Path(folder), tiny=small())
            told = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "no CUDA device, predictions only"
            words.append(f"{letter} {told}")
            headline(STEP, "seen over predicted: " + "; ".join(words))


if __name__ == "__main__":
    main()
