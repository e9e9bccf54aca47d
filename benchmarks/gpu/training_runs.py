"""Runs of the product's own training over made-up batches: configuration, reader, factories.

The batches are a function of the step alone, so a run needs no shards, and a run that resumes sees what the unbroken
one saw.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data_pipeline.reading import Batch
from pretrain.configuration import RunConfig, parse_config
from pretrain.objectives import StepKeys, build_task
from pretrain.training.processes import Processes
from pretrain.training.rank import Factories

CLASSES = 8
TINY_MODEL: dict[str, Any] = {
    "name": "custom",
    "overrides": {
        "channels": 32,
        "depths": [1, 1, 2, 1],
        "groups": [2, 4, 8, 16],
        "layer_scale": None,
        "clip_embed_dim": 64,
        "clip_heads": 2,
    },
}


def tiny(**training: Any) -> RunConfig:
    """The whole M3I-style objective over an InternImage of 1 M parameters at 64 px; `training` as in the section."""
    return parse_config(
        {
            "model": TINY_MODEL,
            "objective": {
                "embed_dim": 64,
                "decoder": {"dim": 32, "layers": 1, "heads": 2, "projector_layers": 1},
                "text": {"width": 32, "layers": 1, "heads": 2, "vocab_size": 600},
            },
            "data": {"sources": [{"path": "made-up"}], "image_size": 64, "context_length": 16, "workers": 0},
            "optimizer": {"lr": 1e-3, "clip_grad": 1.0},
            "schedule": {"steps": 20, "warmup_steps": 2},
            "training": {"batch_size": 8, "precision": "bf16", "log_every": 1, **training},
            "checkpoint": {"every_steps": 5},
        }
    )


class MadeUpReader:
    """Random pictures, captions and labels. killed_at: SIGKILL to this process when that step asks for its batch."""

    num_classes = CLASSES
    epoch_samples = 4096

    def __init__(self, config: RunConfig, batch: int | None = None, killed_at: int | None = None) -> None:
        self.config, self.killed_at = config, killed_at
        self.batch = batch or config.training.batch_size

    def batches(self, start_step: int) -> Iterator[Batch]:
        step = start_step
        while True:
            if step == self.killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield made_up_batch(self.config, self.batch, step)
            step += 1

    def close(self) -> None:
        pass


def made_up_batch(config: RunConfig, size: int, step: int) -> Batch:
    """On the CPU; pinned where there is a GPU to copy it to, as the real reader's are."""
    data, vocabulary = config.data, config.objective.text.vocab_size
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, vocabulary - 2, (size, data.context_length), generator=random)
    tokens[:, -1] = vocabulary - 1  # the end of the text, where the tower pools
    crops = torch.tensor([0.0, 0.0, 96.0, 96.0, 0.0, 128.0]).expand(size, data.views, 6).clone()
    crops[..., :2] = torch.randint(0, 32, (size, data.views, 2), generator=random).float()
    shape = (size, data.views, data.image_size, data.image_size, 3)
    batch = Batch(
        step=step,
        micro=0,
        positions=torch.arange(step * size, (step + 1) * size),
        views=torch.randint(0, 256, shape, generator=random, dtype=torch.uint8),
        crops=crops,
        tokens=tokens,
        has_text=torch.ones(size, dtype=torch.bool),
        labels=torch.randint(CLASSES, (size,), generator=random),
        has_label=torch.ones(size, dtype=torch.bool),
    )
    return batch.pin() if torch.cuda.is_available() else batch


def factories(killed_at: int | None = None) -> Factories:
    def reader(config: RunConfig, processes: Processes, events: Any, run: Path) -> MadeUpReader:
        return MadeUpReader(config, killed_at=killed_at)

    return Factories(build_task, reader, StepKeys)
