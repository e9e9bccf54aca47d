"""A run or checkpoint as a model ready to be evaluated; and the same model untrained, to stand beside it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.configuration.schema import RunConfig
from pretrain.objectives import Task, build_task, build_tokenizer


def load_task(path: Path | str, which: str = "ema", device: torch.device | str | None = None) -> tuple[Task, RunConfig]:
    """The task of a run directory or checkpoint with its weights, in evaluation mode, and the run's configuration.

    which: "ema" (averaged weights) or "model". device: a GPU where there is one, by default.
    Raises UserError where there is no checkpoint, or it does not fit its own configuration.
    """
    from pretrain.training.checkpoints import load_weights

    weights, config = load_weights(path, which)
    task = build_task(config, classes=classifier_rows(weights))
    wrong = task.load_state_dict(weights, strict=False)
    if wrong.missing_keys or wrong.unexpected_keys:
        raise UserError(
            f"{path}: the checkpoint does not fit its configuration: {len(wrong.missing_keys)} entries missing "
            f"{wrong.missing_keys[:3]}, {len(wrong.unexpected_keys)} unknown {wrong.unexpected_keys[:3]}; "
            "evaluate it with the version of this program that wrote it"
        )
    return task.eval().to(device or default_device()), config


def untrained_task(config: RunConfig, classes: int, device: torch.device | str | None = None) -> Task:
    """The task of `config` as it was before its first step (up to the draw of its initial weights)."""
    with torch.random.fork_rng():
        torch.manual_seed(config.training.seed)
        task = build_task(config, classes=classes)
    return task.eval().to(device or default_device())


def tokenizer_of(config: RunConfig) -> Callable[[list[str]], Tensor]:
    """list of n strings -> int64 [n, context_length], as the run's reader made its tokens."""
    return build_tokenizer(config.data.context_length, config.objective.text.vocab_size)


def classifier_rows(weights: dict[str, Tensor]) -> int:
    """Classes that the image model's head tells apart; 0 where it has none."""
    head = weights.get("image.head.weight")
    return 0 if head is None else len(head)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
