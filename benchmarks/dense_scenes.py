"""Does the demo's pretraining help detection and segmentation? Both sides at equal steps, over seeds.

    python benchmarks/dense_scenes.py RUN --output runs/dense [--seeds 2] [--steps 200] [--tasks mask-rcnn upernet ...]

RUN is a finished `internimage demo`. Scenes are looked at with 128 px on the shorter side, four a step. Both sides of a
comparison take the best of the rates, tried on a shorter schedule and scored on the validation scenes; then the
held-out scenes, whose concepts neither side has seen, are scored once a seed. Mask2Former and Deformable DETR run once,
from the pretrained backbone. Prints the difference first. 22 runs, 8,300 steps in all: about two hours of one core;
killed, the same command goes on where it was, and what has its score under OUTPUT/scores is not done again.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from machine import machine

from data_pipeline.durable import write_durably
from pretrain.configuration import RunConfig, load_config
from pretrain.demo.dense import fine_tuning
from pretrain.demo.scenes import build_scenes
from pretrain.evaluation import evaluate
from pretrain.finetuning import finetune
from pretrain.tasks.task import main_score_of, task_of

RATES = (1e-3, 3e-3)
COUNTS = {"train": 400, "validation": 40, "held-out": 100}
RESULTS = Path(__file__).parent / "results" / "dense_scenes.json"
_OBJECT_VIEWS = ("data.rectangle={shorter: [112, 128], longer: 192}", "data.image_size=192")
_QUERIES = "heads: 4, queries: 40, encoder_layers: 2, decoder_layers: 3"
_MASK2FORMER = f"{{width: 64, hidden: 128, encoder_hidden: 128, points: 1024, {_QUERIES}}}"


class Task(NamedTuple):
    """config: the shipped recipe that `changes` adapt. kind: of the packed scenes. compared: against random weights.
    times: that many times as many steps, where a step costs less or queries have to find their places first.
    """

    config: str
    kind: str
    changes: tuple[str, ...]
    compared: bool = True
    times: int = 1


TASKS = {
    "mask-rcnn": Task("demo_mask_rcnn", "objects", _OBJECT_VIEWS),
    "upernet": Task(
        "demo_upernet",
        "labels",
        ("data.rectangle={shorter: [128], longer: 256, scale: [0.75, 1.5]}", "data.image_size=128"),
        times=3,
    ),
    "mask2former": Task(
        "demo_mask_rcnn",
        "objects",
        (*_OBJECT_VIEWS, f"task={{name: query_instance, mask2former: {_MASK2FORMER}}}"),
        compared=False,
        times=3,
    ),
    "deformable-detr": Task(
        "demo_mask_rcnn",
        "objects",
        (*_OBJECT_VIEWS, f"task={{name: query_detection, width: 64, hidden: 128, {_QUERIES}}}"),
        compared=False,
        times=10,
    ),
}
Scores = dict[str, float]


class Bench(NamedTuple):
    """source: the demo's run. steps, trial_steps: of a run that counts, and of one that tries a rate."""

    source: Path
    scenes: dict[str, Path]
    output: Path
    steps: int
    trial_steps: int

    def configuration(self, task: Task, steps: int, rate: float, seed: int) -> RunConfig:
        name, *changes = fine_tuning(self.source, task.config, task.kind, self.scenes["train"])
        changes += [*task.changes, f"schedule.steps={steps}", f"schedule.warmup_steps={max(1, steps // 20)}"]
        changes += [f"optimizer.lr={rate}", f"training.seed={seed}", "training.batch_size=4"]
        return load_config(name, [*changes, "checkpoint.every_steps=50"])

    def scored(self, name: str, *, pretrained: bool, rate: float, seed: int, trial: bool) -> Scores:
        """Trains and scores where that is not done; scores of the EMA weights by name."""
        task, side = TASKS[name], "pretrained" if pretrained else "random"
        run = f"{name}-{side}-{rate:g}-{f'trial-{self.trial_steps}' if trial else f'{seed}-{self.steps}'}"
        kept = self.output / "scores" / f"{run}.json"
        if not kept.exists():
            steps = task.times * (self.trial_steps if trial else self.steps)
            config = self.configuration(task, steps, rate, seed)
            source = self.source if pretrained else None
            if code := finetune(config, source=source, output=self.output / run):
                raise SystemExit(f"{run}: ended with exit code {code}; the same command goes on")
            data = self.scenes["validation" if trial else "held-out"] / task.kind
            (result,) = evaluate(self.output / run, data, untrained=False).values()
            scores = {entry["name"]: entry["value"] for entry in result["scores"]}
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_durably(kept, json.dumps(scores, indent=1) + "\n")
        found: Scores = json.loads(kept.read_text())
        return found

    def side(self, name: str, *, pretrained: bool, seeds: int) -> dict[str, Any]:
        """The best rate by the main score of the task, where that is equal by all scores; then the runs that count."""
        tried = {rate: self.scored(name, pretrained=pretrained, rate=rate, seed=0, trial=True) for rate in RATES}
        main = main_score_of(task_of(self.configuration(TASKS[name], 2, RATES[0], 0))).score
        best = max(tried, key=lambda rate: (tried[rate][main], sum(tried[rate].values())))
        runs = [self.scored(name, pretrained=pretrained, rate=best, seed=seed, trial=False) for seed in range(seeds)]
        return {"rate": best, "validation": {rate: found[main] for rate, found in tried.items()}, "runs": runs}


def lines(name: str, sides: dict[str, Any]) -> Iterator[str]:
    for score in sides["pretrained"]["runs"][0]:
        values = {side: [run[score] for run in found["runs"]] for side, found in sides.items()}
        if "random" not in values:
            yield f"{name} {score}: {mean(values['pretrained']):.3f}"
            continue
        ours, theirs = values["pretrained"], values["random"]
        spread = max(max(one) - min(one) for one in values.values())
        yield (
            f"{name} {score}: {mean(ours) - mean(theirs):+.3f} ({mean(ours):.3f} against {mean(theirs):.3f}), "
            f"range over seeds at most {spread:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--trial-steps", type=int, default=60)
    parser.add_argument("--scenes", type=int, default=COUNTS["train"], help="for training; the others in proportion")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    counts = {split: max(2, count * given.scenes // COUNTS["train"]) for split, count in COUNTS.items()}
    scenes = build_scenes(given.run / "shards", given.output / "scenes", counts=counts)
    bench = Bench(given.run, scenes, given.output, given.steps, given.trial_steps)
    results: dict[str, Any] = {}
    for name in given.tasks:
        sides = {"pretrained": bench.side(name, pretrained=True, seeds=given.seeds if TASKS[name].compared else 1)}
        if TASKS[name].compared:
            sides["random"] = bench.side(name, pretrained=False, seeds=given.seeds)
        results[name] = sides
    for name, sides in results.items():
        print("\n".join(lines(name, sides)))
    about = {"machine": machine("torch", "torchvision", "transformers"), "steps": given.steps, "scenes": counts}
    write_durably(given.results, json.dumps({**about, "rates": RATES, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
