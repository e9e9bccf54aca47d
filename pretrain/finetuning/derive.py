"""The configuration that fine-tunes what another configuration pretrains: the same backbone and images, labels only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.configuration import RunConfig, parse_config, set_key
from pretrain.tasks.pretraining.task import Pretraining


def image_model_of(config: RunConfig) -> dict[str, Any]:
    """The section `model` of a run that starts from the image model of a run of `config`."""
    overrides = dict(config.model.overrides)
    if isinstance(config.task, Pretraining):  # which adds these by itself
        overrides |= {"use_clip_projector": True, "head_hidden_size": config.task.embed_dim}
    return {"name": config.model.name, "overrides": overrides}


def classifier_config(
    pretraining: RunConfig, *, train: Path | str, steps: int, changes: Mapping[str, Any] | None = None
) -> RunConfig:
    """Model, image size, normalisation and augmentation of `pretraining`, task classification, one view.

    Args:
        train: folder of the labelled training set.
        steps: length of the run.
        changes: key.path -> value, as {"optimizer.lr": 1e-3}; optimizer, schedule and training are otherwise the
            schema's defaults with the pretraining's batch, precision, ZeRO stage and seed.

    Raises UserError for a key that does not exist.
    """
    data, training = pretraining.data, pretraining.training
    raw: dict[str, Any] = {
        "model": image_model_of(pretraining),
        "task": {"name": "classification"},
        "data": data.model_dump(mode="json")
        | {"sources": [{"path": str(train), "captions": False}], "views": 1, "cache": data.cache.model_dump()},
        "optimizer": {"betas": [0.9, 0.999]},
        "schedule": {"steps": steps},
        "training": {
            "batch_size": training.batch_size,
            "precision": training.precision,
            "zero_stage": training.zero_stage,
            "seed": training.seed,
        },
    }
    for path, value in (changes or {}).items():
        set_key(raw, path, value)
    return parse_config(raw, source="fine-tuning configuration")
