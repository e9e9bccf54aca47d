import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

from evaluation_shapes import write_set
from finetuning_configurations import tiny_configuration

from pretrain.configuration import RunConfig


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 circles in 3 colours, which are their labels and captions."""
    return write_set(tmp_path_factory.mktemp("sets") / "shapes", name="shapes")


@pytest.fixture
def finetuning(shapes: Path) -> Callable[..., RunConfig]:
    def make(steps: int, **changes: object) -> RunConfig:
        return tiny_configuration(shapes, "supervised", steps, **changes)

    return make


@pytest.fixture(scope="session")
def pretrained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of M3I-style pretraining: a real run directory with image encoder, text, decoder and classifier."""
    from pretrain.training import run

    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    assert run(tiny_configuration(shapes, "m3i", 2), folder) == 0
    return folder
