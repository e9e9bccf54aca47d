"""A run or checkpoint as a model ready to be evaluated; and the same model untrained, to stand beside it."""

from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.errors import UserError, first_ten
from pretrain.configuration.schema import RunConfig
from pretrain.tasks.module import TaskModule
from pretrain.tasks.task import module_of, task_of
from pretrain.training.checkpoint.disk import AUTO, Checkpoint, find_checkpoint


class Loaded(NamedTuple):
    """A module with a checkpoint's weights, in evaluation mode, and what the checkpoint says of itself."""

    module: TaskModule
    config: RunConfig
    checkpoint: Checkpoint

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the labels that it was trained on, in the order of its classifier's rows."""
        return self.checkpoint.trained_on.classes


def load_module(
    path: Path | str, which: str = "ema", choice: str = AUTO, device: torch.device | str | None = None
) -> Loaded:
    """The module of a run directory or checkpoint with its weights.

    which: "ema" or "model". choice: of a run's checkpoints (see find_checkpoint). device: a GPU where there is one, by
    default. Raises UserError where there is no checkpoint, or it does not fit its own configuration.
    """
    checkpoint = find_checkpoint(Path(path), choice)
    weights, config = checkpoint.load(which), checkpoint.config
    module = module_of(config, classes=task_of(config).classes_of(weights))
    wrong = module.load_state_dict(weights, strict=False)
    if wrong.missing_keys or wrong.unexpected_keys:
        raise UserError(
            f"{checkpoint.path}: the checkpoint does not fit its configuration: missing are "
            f"{first_ten(wrong.missing_keys) or 'none'}; unknown are {first_ten(wrong.unexpected_keys) or 'none'}; "
            "evaluate it with the version of this program that wrote it"
        )
    return Loaded(module.eval().to(device or default_device()), config, checkpoint)


def untrained_like(module: TaskModule, config: RunConfig, device: torch.device | str | None = None) -> TaskModule:
    """`module` as it was before its first step (up to the draw of its initial weights)."""
    with torch.random.fork_rng():
        torch.manual_seed(config.training.seed)
        fresh = module_of(config, classes=task_of(config).classes_of(module.state_dict()))
    return fresh.eval().to(device or default_device())


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
