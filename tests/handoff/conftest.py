"""A run without a run: a task's weights, handed out as pretrain.training.checkpoint.disk would."""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.configuration import parse_config

ARGUMENTS = {
    "channels": 16,
    "depths": [1, 1, 2, 1],
    "groups": [1, 2, 4, 8],
    "drop_path_rate": 0.1,
    "clip_embed_dim": 64,
    "clip_heads": 4,
}


def run_config(preset: str = "m3i", **overrides):
    pretraining = {
        "preset": preset,
        "embed_dim": 32,
        "text": {"width": 32, "layers": 1, "heads": 2},
        "decoder": {"dim": 32, "layers": 1, "heads": 2},
    }
    return parse_config(
        {
            "model": {"name": "custom", "overrides": {**ARGUMENTS, **overrides}},
            "task": {"name": "classification"} if preset == "supervised" else pretraining,
            "data": {"sources": [{"path": "nowhere"}], "image_size": 64, "mean": [0.5, 0.4, 0.3]},
            "schedule": {"steps": 1},
        }
    )


@pytest.fixture
def fake_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """make(preset) -> (the run's folder, the weights that its checkpoint holds), every offset other than at its initial
    zero.
    """

    def make(preset: str = "m3i", **overrides):
        from pretrain.tasks.task import module_of

        config = run_config(preset, **overrides)
        torch.manual_seed(0)
        weights = module_of(config, classes=5).state_dict()
        weights = {
            name: torch.randn_like(value) * 0.1 if name.endswith("offset_mask.weight") else value
            for name, value in weights.items()
        }
        module = types.ModuleType("pretrain.training.checkpoint.disk")
        module.load_weights = lambda path, which: (weights, config)
        monkeypatch.setitem(sys.modules, "pretrain.training.checkpoint.disk", module)
        folder = tmp_path / "run"
        folder.mkdir()
        return folder, weights

    return make
