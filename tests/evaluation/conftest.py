import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "handoff"))  # for checkpoints

from evaluation_shapes import Painter, write_set

from pretrain.configuration import RunConfig, parse_config


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    return write_set(tmp_path / "held-out")


@pytest.fixture
def config() -> RunConfig:
    data = {"sources": [{"path": "nowhere"}], "image_size": 32, "context_length": 8}
    return parse_config({"data": data, "schedule": {"steps": 1}})


@pytest.fixture
def painter() -> Painter:
    return Painter()
