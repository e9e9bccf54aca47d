"""A run or checkpoint as a model ready to be evaluated; and the same model untrained, to stand beside it."""

from pathlib import Path

import torch

from data_pipeline.errors import UserError
from pretrain.configuration.schema import RunConfig
from pretrain.tasks.module import TaskModule
from pretrain.tasks.task import module_of, task_of


def load_module(
    path: Path | str, which: str = "ema", device: torch.device | str | None = None
) -> tuple[TaskModule, RunConfig]:
    """The module of a run directory or checkpoint with its weights, in evaluation mode, and the run's configuration.

    which: "ema" or "model". device: a GPU where there is one, by default.
    Raises UserError where there is no checkpoint, or it does not fit its own configuration.
    """
    from pretrain.training.checkpoint.disk import load_weights

    weights, config = load_weights(path, which)
    module = module_of(config, classes=task_of(config).classes_of(weights))
    wrong = module.load_state_dict(weights, strict=False)
    if wrong.missing_keys or wrong.unexpected_keys:
        raise UserError(
            f"{path}: the checkpoint does not fit its configuration: {len(wrong.missing_keys)} entries missing "
            f"{wrong.missing_keys[:3]}, {len(wrong.unexpected_keys)} unknown {wrong.unexpected_keys[:3]}; "
            "evaluate it with the version of this program that wrote it"
        )
    return module.eval().to(device or default_device()), config


def untrained_like(module: TaskModule, config: RunConfig, device: torch.device | str | None = None) -> TaskModule:
    """`module` as it was before its first step (up to the draw of its initial weights)."""
    with torch.random.fork_rng():
        torch.manual_seed(config.training.seed)
        fresh = module_of(config, classes=task_of(config).classes_of(module.state_dict()))
    return fresh.eval().to(device or default_device())


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
