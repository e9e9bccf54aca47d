"""What a training step of every preset costs beside a supervised one: time and memory, and M3I beside its passes.

    python benchmarks/preset_steps.py [--rows 64] [--rounds 8]

The demo's backbone at 64 px on random pictures, one thread; steps take turns, CPU seconds are counted and the least is
taken, so that other work on the machine hits all alike. Memory is what autograd keeps between the two passes. M3I's
passes are what it cannot do without: a step of clip_category (the student's two passes, its text and category), the
teacher's pass over two views, and the decoder's two passes for both targets. Also the cost of each augmentation of a
view, at 64 and 224 px. Result: results/preset_steps.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from data_pipeline.reading import ImageTextTargets
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.config import AugmentationConfig
from data_pipeline.reading.decode.augmentation import augment, turned
from pretrain.configuration import load_config
from pretrain.objectives.keys import StepKeys
from pretrain.objectives.position import identity_parameters
from pretrain.studies.arms import SUPERVISED
from pretrain.tasks.module import TaskModule
from pretrain.tasks.pretraining.module import PretrainingModule
from pretrain.tasks.pretraining.recipes import RECIPES
from pretrain.tasks.task import module_of

RESULT = Path(__file__).parent / "results" / "preset_steps.json"
KEYS = StepKeys(0, 0)
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "jitter with hue, grey": {"color_jitter": 0.4, "hue": 0.1, "grey": 0.2},
    "blur": {"blur": 1.0},
    "solarize": {"solarize": 1.0},
    "rotation and shift": {"rotate": 15.0, "shift": 0.1},
    "RandAugment m9": {"rand_augment": "rand-m9-mstd0.5-inc1"},
}


Pass = Callable[[], torch.Tensor]


def make(preset: str, rows: int) -> tuple[TaskModule, Pass, Pass]:
    """A module, its forward pass with the teacher's, and the teacher's alone."""
    own = [SUPERVISED] if preset == "supervised" else [f"task.preset={preset}"]
    own += [] if preset in ("supervised", "m3i") else ["task.balance=null"]
    config = load_config("study_m3i", own)
    module = module_of(config, classes=9).train()
    size, views, length = config.data.image_size, config.data.views, config.data.context_length
    tokens = torch.randint(1, 4000, (rows, length))
    tokens[:, -1] = 4095
    targets = ImageTextTargets(
        tokens, torch.ones(rows, dtype=torch.bool), torch.randint(0, 9, (rows,)), torch.ones(rows, dtype=torch.bool)
    )
    pixels = torch.randint(0, 256, (rows, views, size, size, 3), dtype=torch.uint8)
    crops = torch.tensor([0.0, 0.0, size, size, 0.0, size]).expand(rows, views, 6)
    batch, teacher = Batch(0, 0, torch.arange(rows), pixels, crops, targets), module.teacher()

    def forward() -> torch.Tensor:
        taught = module.teacher_targets(teacher, batch, KEYS) if teacher is not None else None
        return module(batch, KEYS, taught, False).total

    def teach() -> torch.Tensor:
        assert teacher is not None
        module.teacher_targets(teacher, batch, KEYS)
        return torch.zeros((), requires_grad=True)

    return module, forward, teach


def decode(module: PretrainingModule, rows: int) -> Pass:
    """The decoder's passes for both targets of M3I, on half of the tokens each."""
    grid = module.image_size // 16
    tokens, index = torch.randn(rows, grid * grid // 2, module.image.num_features), torch.arange(grid * grid // 2)

    def forward() -> torch.Tensor:
        total = torch.zeros(())
        for _ in range(2):
            seen = tokens.clone().requires_grad_()
            total = (
                total
                + module.predictor(module.projector(seen), index, identity_parameters(rows, seen.device), grid).mean()
            )
        return total

    return forward


def kept(forward: Pass) -> int:
    """Bytes that autograd keeps, each storage once."""
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    del result
    return sum(storages.values())


def augmentations() -> dict[str, dict[str, float]]:
    """Microseconds a view."""
    found: dict[str, dict[str, float]] = {}
    for name, options in AUGMENTATIONS.items():
        config = AugmentationConfig(**options)
        for size in (64, 224):
            view = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
            costs = []
            for turn in range(5):
                began = time.process_time()
                for position in range(100):
                    augment(turned(view, config, turn, position), config, turn, position, 0)
                costs.append((time.process_time() - began) / 100)
            found.setdefault(name, {})[f"{size} px"] = round(1e6 * min(costs), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    made = {name: make(name, options.rows) for name in ("supervised", *RECIPES)}
    work = {name: forward for name, (_, forward, _) in made.items()}
    memory = {name: kept(forward) for name, forward in work.items()}
    whole, _, teach = made["m3i"]
    assert isinstance(whole, PretrainingModule)
    work |= {"the teacher's pass": teach, "the decoder's passes": decode(whole, options.rows)}
    costs: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.rounds):
        for name, forward in work.items():
            began = time.process_time()
            forward().backward()
            costs[name].append(time.process_time() - began)
    least = {name: min(values[1:]) for name, values in costs.items()}
    passes = least["clip_category"] + least["the teacher's pass"] + least["the decoder's passes"]
    result = {
        "machine": about, "rows": options.rows, "step_ms": {name: round(1e3 * v, 1) for name, v in least.items()},
        "beside_supervised": {name: round(v / least["supervised"], 2) for name, v in least.items()},
        "kept_mb": {name: round(v / 1e6, 1) for name, v in memory.items()},
        "m3i_beside_its_passes": round(least["m3i"] / passes, 3), "augmentation_us": augmentations(),
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, ratio in result["beside_supervised"].items():
        print(f"{name:24s} {ratio:5.2f} x supervised  {1e3 * least[name]:7.1f} ms  {memory.get(name, 0) / 1e6:7.1f} MB")
    print(f"m3i beside its passes: {result['m3i_beside_its_passes']}; {json.dumps(result['augmentation_us'])}")


if __name__ == "__main__":
    main()
