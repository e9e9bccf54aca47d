"""A tiny configuration of every preset, and a batch with missing captions, missing labels and a repeated caption."""

from typing import Any

import torch

from data_pipeline.reading import Batch, ImageTextTargets
from pretrain.configuration import RunConfig, parse_config
from pretrain.objectives.text import build_tokenizer
from pretrain.tasks.module import TaskModule
from pretrain.tasks.task import module_of

CLASSES, SIZE, LENGTH, VOCABULARY = 3, 64, 12, 1024
TINY = {
    "channels": 16,
    "depths": [1, 1, 1, 1],
    "groups": [1, 2, 4, 8],
    "drop_path_rate": 0.2,
    "clip_embed_dim": 32,
    "clip_heads": 4,
    "head_hidden_size": 24,
}


def make_config(preset: str, *, size: int = SIZE, overrides: dict[str, Any] | None = None, **objective) -> RunConfig:
    task = {"name": "classification", **objective}
    if preset != "supervised":
        task = {
            "preset": preset,
            "embed_dim": TINY["head_hidden_size"],
            "decoder": {"dim": 16, "projector_layers": 1, "layers": 1, "heads": 2},
            "text": {"width": 16, "layers": 1, "heads": 2, "vocab_size": VOCABULARY},
            **objective,
        }
    return parse_config(
        {
            "model": {"name": "custom", "overrides": {**TINY, **(overrides or {})}},
            "task": task,
            "data": {"sources": [{"path": "nowhere"}], "image_size": size, "context_length": LENGTH},
            "schedule": {"steps": 10},
        }
    )


def make_task(preset: str, *, dtype: torch.dtype = torch.float64, **options) -> TaskModule:
    """Built from one seed, with offsets and mixing far from their initial zeros."""
    torch.manual_seed(3)
    task = module_of(make_config(preset, **options), classes=CLASSES)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if parameter.ndim == 1 or "offset" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return task.to(dtype)


def make_batch(rows: int = 12, *, size: int = SIZE, step: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    width = torch.full((rows, 2), 80.0)
    h, w = 20 + 30 * draw(rows, 2), 20 + 30 * draw(rows, 2)
    top, left = (60 - h) * draw(rows, 2), (width - w) * draw(rows, 2)
    crops = torch.stack([top, left, h, w, (draw(rows, 2) < 0.5).float(), width], dim=-1)
    words = ["red", "blue", "green", "round", "square", "small", "large", "cat", "dog", "house", "tree", "fish"]
    captions = [f"a {words[i % len(words)]} {words[(5 * i) % len(words)]}" for i in range(rows)]
    captions[rows - 2] = captions[1]  # a duplicate, on another rank than the first
    has_text = torch.tensor([i % 3 != 0 or i == 0 for i in range(rows)])
    has_text[rows // 2 - 2 : rows // 2] = False
    labels = torch.tensor([i * 7 % CLASSES for i in range(rows)])
    has_label = torch.tensor([i % 4 != 1 for i in range(rows)])
    if rows >= 12:
        has_label[rows - 4 :] = False  # the last of three ranks has none
    return Batch(
        step=step,
        micro=0,
        positions=torch.arange(rows) + 1200,
        views=torch.randint(0, 256, (rows, 2, size, size, 3), dtype=torch.uint8, generator=generator),
        crops=crops,
        targets=ImageTextTargets(
            tokens=build_tokenizer(LENGTH, VOCABULARY)(captions),
            has_text=has_text,
            labels=torch.where(has_label, labels, -1),
            has_label=has_label,
        ),
    )


def rows_of(batch: Batch, first: int, last: int) -> Batch:
    return batch.map_tensors(lambda tensor: tensor[first:last])
