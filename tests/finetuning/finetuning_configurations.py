"""Configurations of seconds-long runs on the drawn shapes."""

from pathlib import Path
from typing import Any

from pretrain.configuration import RunConfig, parse_config

TINY = {"channels": 16, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8], "clip_embed_dim": 32, "clip_heads": 2}


def tiny_configuration(shapes: Path, preset: str, steps: int, **changes: Any) -> RunConfig:
    labels_only = preset == "supervised"
    head = {"use_clip_projector": True, "head_hidden_size": 32} if labels_only else {}
    pretraining = {
        "preset": preset,
        "embed_dim": 32,
        "text": {"width": 32, "layers": 1, "heads": 2, "vocab_size": 600},
        "decoder": {"dim": 32, "layers": 1, "heads": 2},
    }
    raw: dict[str, Any] = {
        "model": {"name": "custom", "overrides": TINY | head},
        "task": {"name": "classification"} if labels_only else pretraining,
        "data": {
            "sources": [{"path": str(shapes)}],
            "image_size": 32,
            "context_length": 16,
            "workers": 0,
            "views": 1 if labels_only else 2,
        },
        "optimizer": {"lr": 2e-3},
        "schedule": {"steps": steps, "warmup_steps": 0},
        "training": {"batch_size": 6, "precision": "fp32", "log_every": 1, "ema": {"decay": 0.5}},
        "checkpoint": {"asynchronous": False},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw[section][name] = value
    return parse_config(raw)
