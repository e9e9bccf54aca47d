"""Runs of the product's own training over made-up batches: configuration, reader, task.

The batches are a function of the step alone, so a run needs no shards, and a run that resumes sees what the unbroken
one saw.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from data_pipeline.reading import Batch, DataConfig, ImageTextTargets, Targets
from data_pipeline.reading.faults import FaultLog
from data_pipeline.reading.order.course import Segment
from data_pipeline.reading.storage.sources import SourceRecord
from pretrain.configuration import RunConfig, parse_config
from pretrain.configuration.schema import ModelConfig
from pretrain.tasks.pretraining.module import PretrainingModule
from pretrain.tasks.pretraining.task import Pretraining
from pretrain.tasks.task import ReaderOptions

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
            "task": {
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

    num_classes, epoch_samples, fingerprint = CLASSES, 4096, "made up"
    classes: tuple[str, ...] | None = None
    sources: tuple[SourceRecord, ...] = ()

    def __init__(self, config: RunConfig, batch: int | None = None, killed_at: int | None = None) -> None:
        self.config, self.killed_at = config, killed_at
        self.batch = batch or config.training.batch_size
        self.faults = FaultLog(config.data.max_bad_rate, None)

    def has_labels(self) -> bool:
        return True

    def batches(self, start_step: int, _segments: Sequence[Segment] = ()) -> Iterator[Batch[Targets]]:
        step = start_step
        while True:
            if step == self.killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield made_up_batch(self.config, self.batch, step)
            step += 1

    def progress(self, step: int) -> dict[str, dict[str, float]]:
        return {}

    def close(self) -> None:
        pass


def made_up_batch(config: RunConfig, size: int, step: int) -> Batch[Targets]:
    """On the CPU; pinned where there is a GPU to copy it to, as the real reader's are."""
    assert isinstance(config.task, Pretraining)
    data, vocabulary = config.data, config.task.text.vocab_size
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
        targets=ImageTextTargets(
            tokens=tokens,
            has_text=torch.ones(size, dtype=torch.bool),
            labels=torch.randint(CLASSES, (size,), generator=random),
            has_label=torch.ones(size, dtype=torch.bool),
        ),
    )
    return batch.pin() if torch.cuda.is_available() else batch


def made_up(config: RunConfig, *, killed_at: int | None = None, device: str | torch.device = "cpu") -> RunConfig:
    """The same run over made-up batches, its module made on `device`. Its folder names the ordinary task, as it is read
    like any other run's.
    """

    class MadeUp(Pretraining):
        def open_reader(self, data: DataConfig, options: ReaderOptions) -> MadeUpReader:
            return MadeUpReader(config, killed_at=killed_at)

        def build(self, model: ModelConfig, data: DataConfig, *, classes: int) -> PretrainingModule:
            with torch.device(device):
                return super().build(model, data, classes=classes)

    return config.model_copy(update={"task": MadeUp(**config.task.model_dump())})
