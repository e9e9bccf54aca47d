"""May this configuration continue that run? What shapes the result must be as it was, or be named as a wanted change;
where and how it runs may change.
"""

import json
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError
from pretrain.configuration import RunConfig, parse_config
from pretrain.training.checkpoint.disk import DamagedError, complete_checkpoints
from pretrain.training.logging.record import CONFIG, CONFIG_HISTORY

# Keys (and all below them) that change no sample, no loss and no update beyond rounding.
FREE = (
    "checkpoint",
    "deepspeed",
    "evaluation",
    "initialize_from",
    "model.recompute",
    "model.compile",
    "training.zero_stage",
    "training.secondary_partition",
    "training.reduce_gradients",
    "training.offload_optimizer",
    "training.offload_parameters",
    "training.offload_folder",
    "training.policy",
    "training.log_every",
    "training.wandb",
    "training.on_event",
    "training.profile",
    "training.stop_after",
    "training.allow_changes",
    "data.workers",
    "data.prefetch",
    "data.start_method",
    "data.cache",
    "data.max_bad_rate",
)


# Keys (and all below them) that may change in the middle of a run, where `training.allow_changes` names them. They
# change updates, but not what a parameter means; which samples the steps from then on are, segments.py tells.
CHANGEABLE = (
    "optimizer",
    "schedule",
    "training.ema.decay",
    "training.ema.teacher_start",
    "training.ema.teacher_end",
    "task.weights",
    "training.batch_size",
    "training.accumulation",
)
WEIGHTS = re.compile(r"data\.sources\.\d+\.weight")
NEVER = ("optimizer.name",)  # its states in the checkpoint are of another kind
Changes = dict[str, tuple[Any, Any]]  # by key: what it was, what it is now


def check_same_run(run: Path, config: RunConfig) -> Changes:
    """The keys that `config` changes of `run`/config.yaml, and may, as training.allow_changes says.

    Raises UserError where another version wrote the newest checkpoint, and one naming every key that changes and must
    not.
    """
    allowed = tuple(config.training.allow_changes)
    for key in allowed:
        if not _changeable(key):
            raise UserError(
                f"--allow-change {key}: a run may change {', '.join(CHANGEABLE)} and keys below them, and "
                "data.sources.N.weight"
            )
    for checkpoint in complete_checkpoints(run)[:1]:
        with suppress(DamagedError):  # the checkpointer refuses it, and takes the one before
            checkpoint.manifest  # noqa: B018  read for its errors
    path = run / CONFIG
    if not path.exists():
        return {}
    before = parse_config(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    old, new = _flat(before.model_dump(mode="json")), _flat(config.model_dump(mode="json"))
    wanted, refused = changed_keys(before, config)
    if refused:
        lines = "\n".join(f"  {key}: {_said(old, key)} there, {_said(new, key)} now" for key in refused)
        may = [key for key in refused if _changeable(key) and key not in NEVER]
        change = f", change them on purpose (--allow-change {' --allow-change '.join(may)})" if may else ""
        raise UserError(
            f"{run} holds a run of another configuration:\n{lines}\nSet them back to resume it{change}, "
            f"or start a new run with another --output (initialize_from={run} takes its weights)"
        )
    return {key: (old.get(key), new.get(key)) for key in wanted}


def changed_keys(before: RunConfig, config: RunConfig) -> tuple[list[str], list[str]]:
    """Keys of a run that `config` changes: those that training.allow_changes of it allows, and the others."""
    old, new = _flat(before.model_dump(mode="json")), _flat(config.model_dump(mode="json"))
    changed = [key for key in sorted(old | new) if _differs(old, new, key) and not _is_free(key)]
    wanted = [key for key in changed if _below(key, tuple(config.training.allow_changes)) and key not in NEVER]
    return wanted, [key for key in changed if key not in wanted]


def remember_changes(run: Path, changes: Changes, step: int) -> None:
    """Append to the history of the run's configuration: what was changed, from `step` on."""
    if changes:
        with open(run / CONFIG_HISTORY, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "step": step, "changes": changes}) + "\n")


def _changeable(key: str) -> bool:
    return _below(key, CHANGEABLE) or WEIGHTS.fullmatch(key) is not None


def _below(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _differs(old: dict[str, Any], new: dict[str, Any], key: str) -> bool:
    """A model's argument that is not given is not one that is given as null."""
    return (key in old) != (key in new) or old.get(key) != new.get(key)


def _said(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not given"


def _is_free(key: str) -> bool:
    # A set may have moved to another folder; that it is the same one, the number of its samples shows.
    moved = key.startswith("data.sources.") and key.endswith(".path")
    return moved or _below(key, FREE)


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
