import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

from evaluation_shapes import write_set

from pretrain.configuration import RunConfig, parse_config

TINY = {"channels": 16, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8], "clip_embed_dim": 32, "clip_heads": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 circles in 3 colours, which are their labels and captions."""
    return write_set(tmp_path_factory.mktemp("sets") / "shapes", name="shapes")


def configuration(shapes: Path, preset: str, steps: int, **changes: Any) -> RunConfig:
    head = {"use_clip_projector": True, "head_hidden_size": 32} if preset == "supervised" else {}
    raw: dict[str, Any] = {
        "model": {"name": "custom", "overrides": TINY | head},
        "objective": {
            "preset": preset,
            "embed_dim": 32,
            "text": {"width": 32, "layers": 1, "heads": 2, "vocab_size": 600},
            "decoder": {"dim": 32, "layers": 1, "heads": 2},
        },
        "data": {
            "sources": [{"path": str(shapes)}],
            "image_size": 32,
            "context_length": 16,
            "workers": 0,
            "views": 1 if preset == "supervised" else 2,
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


@pytest.fixture
def finetuning(shapes: Path) -> Callable[..., RunConfig]:
    def make(steps: int, **changes: Any) -> RunConfig:
        return configuration(shapes, "supervised", steps, **changes)

    return make


@pytest.fixture(scope="session")
def pretrained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of M3I-style pretraining: a real run directory with image encoder, text, decoder and classifier."""
    from pretrain.training import run

    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    assert run(configuration(shapes, "m3i", 2), folder) == 0
    return folder
