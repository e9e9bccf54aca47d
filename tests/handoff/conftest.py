import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import CLASSES, run_config, write_checkpoint

from pretrain.tasks.task import module_of


@pytest.fixture
def fake_run(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """make(preset) -> (the run's folder, the weights that its checkpoint holds), every offset other than at its initial
    zero. change: a function of the module, called before its weights are written.
    """

    def make(preset: str = "m3i", change: Callable[[torch.nn.Module], None] = lambda module: None, **overrides):
        config = run_config(preset, **overrides)
        torch.manual_seed(0)
        module = module_of(config, classes=len(CLASSES))
        with torch.no_grad():
            for name, value in module.named_parameters():
                if name.endswith(("offset.weight", "mask.weight")):
                    value.copy_(torch.randn_like(value) * 0.1)
            change(module)
        write_checkpoint(tmp_path / "run", config, module)
        return tmp_path / "run", {name: value.detach().clone() for name, value in module.state_dict().items()}

    return make
