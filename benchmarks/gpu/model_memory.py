"""`internimage plan` against the allocator: predicted and seen bytes of training T, B and H at three batch sizes each.

    python benchmarks/gpu/model_memory.py T B H

The recipe of internimage_h_m3i_427m (the whole M3I-style objective, teacher, fp32 average, bf16; T and B under it by
name) with its ZeRO stage on one GPU, H with its blocks recomputed as its recipe has it. Two steps of the product's
loop at each batch size over made-up batches, without checkpoints; seen is the allocator's peak above what stood before
the model was built. Without a GPU only the predictions are rows, of a tiny model.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from needs import packages
from record import headline, record, small

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data_pipeline.reading.order.course import Segment
    from pretrain.configuration import RunConfig
    from pretrain.training.distributed import DistributedContext
    from pretrain.training.loop import LoopParts

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

    def progress(self) -> tuple[bool, bool]:
        return False, False

    def advance(self, *, written: bool, failed: bool) -> None:
        pass

    def due(self, step: int) -> bool:
        return False

    def wait_or_raise(self) -> bool:
        return True


def config_of(letter: str, batch: int, *, tiny: bool) -> RunConfig:
    from training_runs import TINY_MODEL

    from pretrain.configuration import load_config

    changes = {
        "data.sources": "[{path: made-up}]",
        "data.workers": 0,
        "model.num_classes": CLASSES,
        "model.recompute": "blocks" if letter == "H" else "none",
        "schedule.epochs": "null",
        "schedule.steps": STEPS,
        "schedule.warmup_steps": 0,
        "optimizer.lr_batch": "null",
        "optimizer.lr": 1e-6,
        "training.batch_size": batch,
        "training.log_every": STEPS,
    }
    if tiny:
        changes |= {"model.name": "custom", "data.image_size": 64, "task.embed_dim": 64}
        changes |= {f"model.overrides.{name}": value for name, value in TINY_MODEL["overrides"].items()}
        changes |= {"task.text.name": None, "task.text.layers": 1, "task.text.width": 64, "task.text.heads": 2}
        changes |= {"task.decoder.dim": 64, "task.decoder.heads": 2}
    else:
        changes |= {"model.name": f"internimage_{letter.lower()}"}
    return load_config(RECIPE, [f"{key}={value if value is not None else 'null'}" for key, value in changes.items()])


def predicted(config: RunConfig) -> dict[str, Any]:
    """The plan's row of the configured stage, in bytes."""
    from launch.machines import Machine
    from launch.planning import plan_run

    plan = plan_run(config, gpus=1, machine=Machine.of(config, memory=MEMORY_GB), epoch_samples=4096)
    row: dict[str, Any] = next(one for one in plan["stages"] if one["stage"] == config.training.zero_stage)
    return row


def parts_of(config: RunConfig, context: DistributedContext, folder: Path) -> tuple[LoopParts, Sequence[Segment]]:
    """What the product's loop needs, composed as a run composes it, but that nothing is saved."""
    from training_runs import MadeUpReader, made_up

    from pretrain.training.logging.record import EventLog
    from pretrain.training.rank import compose
    from pretrain.training.safeguards.interruption import Interruption
    from pretrain.training.safeguards.watchdog import Watchdog

    folder.mkdir()
    not_started = Watchdog(folder, 0, 600.0, 60.0, lambda kind, message: None, lambda: False)
    reader, events = MadeUpReader(config), EventLog(folder, 0)
    run = made_up(config, device=context.device)
    parts, _, segments = compose(run, folder, None, reader, context, events, not_started, Interruption())
    stand_in: Any = NoCheckpoints(folder)
    return replace(parts, checkpointer=stand_in), segments


def rows_of(letter: str, context: DistributedContext, folder: Path, *, tiny: bool) -> list[float]:
    """Records a row a batch size; the ratios of seen to predicted."""
    from training_runs import MadeUpReader

    from pretrain.training.loop import train

    device, ratios = context.device, []
    cuda = device.type == "cuda"
    sizes = (2, 4) if tiny else BATCHES[letter]
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device) if cuda else 0
    started = time.perf_counter()
    parts, segments = parts_of(config_of(letter, sizes[0], tiny=tiny), context, folder)
    states = torch.cuda.memory_allocated(device) - before if cuda else 0
    built_s = time.perf_counter() - started
    for batch in sizes:
        config = config_of(letter, batch, tiny=tiny)
        plan = predicted(config)
        row: dict[str, Any] = {"model": letter, "batch": batch, "zero_stage": config.training.zero_stage}
        row |= {"recompute": config.model.recompute, "predicted_gb": round(plan["total"] / 1e9, 3)}
        named = ("parameters", "gradients", "optimizer", "average", "teacher", "buckets", "activations")
        row["predicted_parts_gb"] = {name: round(plan[name] / 1e9, 3) for name in named}
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        try:
            train(replace(parts, reader=MadeUpReader(config)), 0, segments)
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
    parts.log.close()
    parts.engine.close()
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(BATCHES))
    parser.add_argument("--small", action="store_true", help="a tiny model: does it run?")
    options = parser.parse_args()
    words = []
    with packages(STEP), TemporaryDirectory() as folder:
        from pretrain.training.distributed import join

        context = join(600.0)
        for letter in options.models:
            ratios = rows_of(letter, context, Path(folder) / letter, tiny=small())
            told = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "no CUDA device, predictions only"
            words.append(f"{letter} {told}")
            headline(STEP, "seen over predicted: " + "; ".join(words))


if __name__ == "__main__":
    main()
