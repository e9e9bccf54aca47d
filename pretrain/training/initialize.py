"""`initialize_from`: start a new run from weights of an old one, or from a file of backbone weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.models import official
from pretrain.models.reading import open_weights
from pretrain.tasks.module import TaskModule
from pretrain.training.checkpoint import disk

ENCODER = ("stem.", "stages."), ("patch_embed.", "levels.")  # by our names and by the official ones


def initialize_from(module: TaskModule, path: Path | str, classes: Sequence[str] | None = None) -> list[str]:
    """Fill what fits by name and shape; the names of the module that kept their fresh values.

    path: a run (its best checkpoint, else its latest) or checkpoint folder, of which the EMA is taken, or a weights
    file or folder in the official layout, of the image model. classes: of the data that the module will be trained on;
    the classifier of `path` is taken only where it is of the same classes in the same order. Raises UserError where
    the stem or a stage of the image model would keep fresh values, which is never meant, and where nothing fits.
    """
    path, layout = Path(path), module.backbone()
    if not path.exists():
        raise UserError(f"initialize_from: {path} does not exist; name a run, a checkpoint or a weights file")
    if disk.is_run(path):
        checkpoint = disk.find_checkpoint(path, disk.AUTO)
        theirs = checkpoint.trained_on.classes
        fitting, listing = _by_name(module.state_dict(), checkpoint.load("ema"))
        encoder = tuple(f"{layout.prefix}{part}" for part in ENCODER[0]) if layout is not None else ()
    else:
        if layout is None:
            raise UserError(f"initialize_from: {path} holds a backbone, and this task has none")
        image, weights = module.get_submodule(layout.prefix.removesuffix(".")), open_weights(path)
        named = (weights.described or {}).get("classes")
        theirs = None if named is None else tuple(named)
        found, listing = official.from_official(image, weights.state)
        fitting = {f"{layout.prefix}{name}": value for name, value in found.items()}
        encoder = ENCODER[1]
    misfits = official.Listing(
        [name for name in listing.missing if name.startswith(encoder)],
        [name for name in listing.unexpected if name.startswith(encoder)],
        [entry for entry in listing.reshaped if entry[0].startswith(encoder)],
    )
    if str(misfits):
        raise UserError(
            f"initialize_from: {path} is of another image model:\n{misfits}\nSet model.name and model.overrides to "
            "those that it was made with"
        )
    if layout is not None and (theirs is None or classes is None or tuple(classes) != theirs):
        classifier = f"{layout.prefix}head."
        fitting = {name: value for name, value in fitting.items() if not name.startswith(classifier)}
    if not fitting:
        raise UserError(f"initialize_from: nothing in {path} fits this model; look at model.name and model.overrides")
    with torch.no_grad():
        kept, _ = module.load_state_dict(fitting, strict=False)
    return list(kept)


def _by_name(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], official.Listing]:
    """The entries of `theirs` that `own` has in the same shape, and what does not fit."""
    both = [name for name in theirs if name in own]
    listing = official.Listing(
        [name for name in own if name not in theirs],
        [name for name in theirs if name not in own],
        [(n, tuple(theirs[n].shape), tuple(own[n].shape)) for n in both if theirs[n].shape != own[n].shape],
    )
    return {name: theirs[name] for name in both if theirs[name].shape == own[name].shape}, listing
