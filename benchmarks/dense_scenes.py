"""Does the demo's pretraining help detection and segmentation? Both sides at equal steps, over seeds.

    python benchmarks/dense_scenes.py RUN --output runs/dense [--seeds 2] [--steps 600] [--tasks mask-rcnn upernet]

RUN is a finished `internimage demo`. For each task both sides take the best of the rates on the validation scenes with
the first seed; the held-out scenes are scored once a seed. Prints the difference first. Hours on two cores.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from machine import machine

from pretrain.configuration import RunConfig, load_config
from pretrain.demo.dense import COUNTS, RECIPES
from pretrain.demo.scenes import build_scenes
from pretrain.evaluation import evaluate
from pretrain.finetuning import finetune
from pretrain.tasks.task import main_score_of, task_of

RATES = (2.5e-4, 5e-4, 1e-3)
RESULTS = Path(__file__).parent / "results" / "dense_scenes.json"


def configuration(task: str, train: Path, steps: int, rate: float, seed: int) -> RunConfig:
    name, kind, _ = RECIPES[task]
    changes = [f"data.sources.0.path={train / kind}", f"schedule.steps={steps}", f"optimizer.lr={rate}"]
    return load_config(name, [*changes, f"training.seed={seed}", "checkpoint.every_steps=null"])


def scored(config: RunConfig, source: Path | None, run: Path, data: Path, label: str) -> dict[str, float]:
    """Trains where that is not done, and scores; by the names of the scores."""
    if code := finetune(config, source=source, output=run):
        raise SystemExit(f"{run}: ended with exit code {code}")
    (result,) = evaluate(run, data, untrained=False, label=label).values()
    return {entry["name"]: entry["value"] for entry in result["scores"]}


def compare(task: str, source: Path, scenes: dict[str, Path], output: Path, steps: int, seeds: int) -> dict[str, Any]:
    _, kind, _ = RECIPES[task]
    sides: dict[str, Any] = {}
    for side, weights in (("pretrained", source), ("random", None)):
        tried = {}
        for rate in RATES:
            config = configuration(task, scenes["train"], steps, rate, 0)
            found = scored(
                config, weights, output / f"{task}-{side}-{rate:g}-0", scenes["validation"] / kind, "validation"
            )
            tried[rate] = found[main_score_of(task_of(config)).score]
        best = max(tried, key=lambda rate: tried[rate])
        runs = []
        for seed in range(seeds):
            config = configuration(task, scenes["train"], steps, best, seed)
            run = output / f"{task}-{side}-{best:g}-{seed}"
            runs.append(scored(config, weights, run, scenes["held-out"] / kind, "unseen"))
        sides[side] = {"rate": best, "validation": tried, "runs": runs}
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tasks", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    given = parser.parse_args()
    scenes = build_scenes(given.run / "shards", given.output / "scenes", counts=COUNTS)
    results = {task: compare(task, given.run, scenes, given.output, given.steps, given.seeds) for task in given.tasks}
    for task, sides in results.items():
        for score in sides["pretrained"]["runs"][0]:
            ours, theirs = ([run[score] for run in sides[side]["runs"]] for side in ("pretrained", "random"))
            spread = max(max(values) - min(values) for values in (ours, theirs))
            print(
                f"{task} {score}: {mean(ours) - mean(theirs):+.3f} ({mean(ours):.3f} against {mean(theirs):.3f}), "
                f"range over seeds at most {spread:.3f}"
            )
    RESULTS.write_text(
        json.dumps(
            {"machine": machine("torch", "torchvision", "transformers"), "steps": given.steps, "results": results},
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
