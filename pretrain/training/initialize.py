"""`initialize_from`: start a new run from weights of an old one, or from a file of backbone weights."""

from collections.abc import Sequence
from pathlib import Path

import torch

from data_pipeline.errors import UserError
from pretrain.models import official
from pretrain.models.reading import read_weights
from pretrain.tasks.module import TaskModule
from pretrain.training.checkpoint import disk


def initialize_from(module: TaskModule, path: Path | str, classes: Sequence[str] | None = None) -> list[str]:
    """Fill what fits by name and shape; the names of the module that kept their fresh values.

    path: a run (its best checkpoint, else its latest) or checkpoint folder, of which the EMA is taken, or a weights
    file or folder in the official layout, of the image model. classes: of the data that the module will be trained on;
    the classifier of `path` is taken only where it is of the same classes in the same order. Raises UserError where
    nothing fits.
    """
    path, layout = Path(path), module.backbone()
    if not path.exists():
        raise UserError(f"initialize_from: {path} does not exist; name a run, a checkpoint or a weights file")
    if (path / disk.FOLDER).is_dir() or (path / disk.MANIFEST).is_file():
        checkpoint = disk.find_checkpoint(path, disk.AUTO)
        own, theirs = module.state_dict(), checkpoint.trained_on.classes
        fitting = {
            name: value
            for name, value in checkpoint.load("ema").items()
            if name in own and own[name].shape == value.shape
        }
    else:
        if layout is None:
            raise UserError(f"initialize_from: {path} holds a backbone, and this task has none")
        image, theirs = module.get_submodule(layout.prefix.removesuffix(".")), None
        found, _ = official.from_official(image, read_weights(path))
        fitting = {f"{layout.prefix}{name}": value for name, value in found.items()}
    if layout is not None and (theirs is None or classes is None or tuple(classes) != theirs):
        classifier = f"{layout.prefix}head."
        fitting = {name: value for name, value in fitting.items() if not name.startswith(classifier)}
    if not fitting:
        raise UserError(f"initialize_from: nothing in {path} fits this model; look at model.name and model.overrides")
    with torch.no_grad():
        kept, _ = module.load_state_dict(fitting, strict=False)
    return list(kept)
