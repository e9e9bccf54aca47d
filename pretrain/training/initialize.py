"""`initialize_from`: start a new run from weights of an old one, or from a file of backbone weights."""

from pathlib import Path

import torch

from data_pipeline.errors import UserError
from pretrain.models import official
from pretrain.models.reading import read_weights
from pretrain.tasks.module import TaskModule
from pretrain.training.checkpoint import disk


def initialize_from(module: TaskModule, path: Path | str) -> list[str]:
    """Fill what fits by name and shape; the names of the module that kept their fresh values.

    path: a run or checkpoint folder (its EMA), or a weights file or folder in the official layout (of the image model;
    a classifier that does not fit stays fresh). Raises UserError where nothing fits.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"initialize_from: {path} does not exist; name a run, a checkpoint or a weights file")
    if (path / disk.FOLDER).is_dir() or (path / disk.MANIFEST).is_file():
        weights, _ = disk.load_weights(path, "ema")
        own = module.state_dict()
        fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    else:
        layout = module.backbone()
        if layout is None:
            raise UserError(f"initialize_from: {path} holds a backbone, and this task has none")
        image = module.get_submodule(layout.prefix.removesuffix("."))
        found, _ = official.from_official(image, read_weights(path))
        fitting = {f"{layout.prefix}{name}": value for name, value in found.items()}
    if not fitting:
        raise UserError(f"initialize_from: nothing in {path} fits this model; look at model.name and model.overrides")
    with torch.no_grad():
        kept, _ = module.load_state_dict(fitting, strict=False)
    return list(kept)
