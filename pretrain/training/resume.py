"""May this configuration continue that run? What shapes the result must be as it was; where and how it runs may
change.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError
from pretrain.configuration import RunConfig, parse_config
from pretrain.training.checkpoint.disk import DamagedError, complete_checkpoints
from pretrain.training.logging.record import CONFIG

# Keys (and all below them) that change no sample, no loss and no update beyond rounding.
FREE = (
    "checkpoint",
    "deepspeed",
    "initialize_from",
    "model.recompute",
    "model.compile",
    "training.zero_stage",
    "training.offload_optimizer",
    "training.offload_parameters",
    "training.offload_folder",
    "training.policy",
    "training.log_every",
    "training.wandb",
    "training.profile",
    "training.stop_after",
    "data.workers",
    "data.prefetch",
    "data.start_method",
    "data.cache",
    "data.max_bad_rate",
)


def check_same_run(run: Path, config: RunConfig) -> None:
    """Raises UserError where another version wrote the newest checkpoint, and one naming every key of `run`/config.yaml
    that `config` changes and must not.
    """
    for checkpoint in complete_checkpoints(run)[:1]:
        with suppress(DamagedError):  # the checkpointer refuses it, and takes the one before
            checkpoint.manifest  # noqa: B018  read for its errors
    path = run / CONFIG
    if not path.exists():
        return
    before = parse_config(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    old, new = _flat(before.model_dump(mode="json")), _flat(config.model_dump(mode="json"))
    changed = [key for key in sorted(old | new) if _differs(old, new, key) and not _is_free(key)]
    if changed:
        lines = "\n".join(f"  {key}: {_said(old, key)} there, {_said(new, key)} now" for key in changed)
        raise UserError(
            f"{run} holds a run of another configuration:\n{lines}\nSet them back to resume it, "
            f"or start a new run with another --output (initialize_from={run} takes its weights)"
        )


def _differs(old: dict[str, Any], new: dict[str, Any], key: str) -> bool:
    """A model's argument that is not given is not one that is given as null."""
    return (key in old) != (key in new) or old.get(key) != new.get(key)


def _said(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not given"


def _is_free(key: str) -> bool:
    # A set may have moved to another folder; that it is the same one, the number of its samples shows.
    moved = key.startswith("data.sources.") and key.endswith(".path")
    return moved or any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(value: object, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)  # type: ignore[assignment]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
