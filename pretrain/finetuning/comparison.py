"""Does pretraining help? The same fine-tuning from a pretrained run and from random weights, over several seeds.

Every choice (learning rate, length, segment) is made on the validation split with the first seed; the held-out set is
scored once a seed, with what was chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.configuration import RunConfig
from pretrain.finetuning.plateau import EVALUATION_BATCH, Plateau, Train, train_to_plateau
from pretrain.tasks.task import main_score_of, task_of

PRETRAINED, RANDOM = "pretrained", "random weights"


@dataclass(frozen=True)
class Arm:
    """One side of the comparison. candidates: configurations to choose among on validation, by name."""

    name: str
    source: Path | None
    candidates: dict[str, RunConfig]


def arms(
    config: RunConfig, pretrained: Path, random_lrs: Sequence[float], pretrained_lrs: Sequence[float] = ()
) -> tuple[Arm, Arm]:
    """Fine-tuning as `config` has it, and from random weights without what only suits trained ones.

    Layer-wise decay and slow offsets protect trained layers; random weights train without. Either side takes the best
    of its own learning lrs (in the sense of optimizer.lr) and config's.
    """
    plain = config.model_copy(deep=True)
    plain.optimizer.layer_decay, plain.optimizer.offset_lr_scale = 1.0, 1.0
    return (
        Arm(PRETRAINED, pretrained, _at_lrs(config, pretrained_lrs)),
        Arm(RANDOM, None, _at_lrs(plain, random_lrs)),
    )


def _at_lrs(config: RunConfig, lrs: Sequence[float]) -> dict[str, RunConfig]:
    """`config` and copies of it at other peak learning rates, by name."""
    found = {}
    for lr in dict.fromkeys((config.optimizer.lr, *lrs)):
        found[f"lr {lr:g}"] = config.model_copy(deep=True)
        found[f"lr {lr:g}"].optimizer.lr = lr
    return found


def run_arm(
    arm: Arm,
    *,
    output: Path,
    validation: Path,
    held_out: Path,
    seeds: Sequence[int],
    segment_steps: int,
    patience: int,
    least_steps: int = 0,
    train: Train | None = None,
) -> dict[str, Any]:
    """Choose a candidate with the first seed, train it with every seed to its plateau, score held-out once each."""
    from pretrain.evaluation import load_module

    def trained(name: str, seed: int) -> Plateau:
        config = arm.candidates[name].model_copy(deep=True)
        config.training.seed = seed
        folder = output / arm.name.replace(" ", "-") / f"{name.replace(' ', '-')}-seed-{seed}"
        return train_to_plateau(
            config,
            source=arm.source,
            output=folder,
            validation=validation,
            segment_steps=segment_steps,
            patience=patience,
            least_steps=least_steps,
            train=train,
        )

    task = task_of(next(iter(arm.candidates.values())))
    main = main_score_of(task)
    first = {name: trained(name, seeds[0]) for name in arm.candidates}
    chosen = max(first, key=lambda name: first[name].validation)
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        plateau = first[chosen] if seed == seeds[0] else trained(chosen, seed)
        loaded = load_module(plateau.checkpoint, "ema")
        result = task.evaluate(
            main.evaluation,
            loaded.module,
            held_out,
            loaded.config,
            classes=loaded.classes,
            batch_size=EVALUATION_BATCH,
        )
        runs.append(
            {
                "seed": seed,
                **{entry["name"]: entry["value"] for entry in result["scores"]},
                f"validation_{main.score}": plateau.validation,
                "steps": plateau.step,
                "plateau": plateau.reached,
                "history": [list(entry) for entry in plateau.history],
            }
        )
    return {
        "arm": arm.name,
        "chosen": chosen,
        "validation_of_candidates": {name: plateau.validation for name, plateau in first.items()},
        "runs": runs,
        **spread([run[main.score] for run in runs]),
        "result": result,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": sum(values) / len(values),
        "least": min(values),
        "most": max(values),
        "range": max(values) - min(values),
    }


def verdict(pretrained: dict[str, Any], random: dict[str, Any]) -> dict[str, Any]:
    """The gain, and whether it exceeds the range over seeds of either side: a gain within it could be a seed's luck."""
    gain = pretrained["mean"] - random["mean"]
    noise = max(pretrained["range"], random["range"])
    return {"gain": gain, "range_over_seeds": noise, "above_range": gain > noise}


def comparison_result(pretrained: dict[str, Any], random: dict[str, Any]) -> dict[str, Any]:
    """Both arms as one evaluation result: the score of pretraining with that of random weights beside it."""
    result = dict(pretrained["result"])
    scores = []
    for entry in result["scores"]:
        name = entry["name"]
        if not all(name in run for arm in (pretrained, random) for run in arm["runs"]):
            continue
        means = [sum(run[name] for run in arm["runs"]) / len(arm["runs"]) for arm in (pretrained, random)]
        scores.append({**entry, "value": means[0], "beside": {**entry["beside"], f"from {RANDOM}": means[1]}})
    return {
        **result,
        "title": "Fine-tuned classification",
        "scores": scores,
        "settings": {
            "seeds": [run["seed"] for run in pretrained["runs"]],
            **verdict(pretrained, random),
            "pretrained": pretrained["chosen"],
            "random": random["chosen"],
        },
    }
