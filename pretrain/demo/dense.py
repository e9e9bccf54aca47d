"""The dense walk: what the demo's pretrained backbone brings to detection and segmentation, on the embedded scenes.

    OUTPUT/scenes/                        scenes of drawings with exact masks, split by concept (scenes.py)
    OUTPUT/mask-rcnn/  mask-rcnn-scratch/ the same fine-tuning from OUTPUT's own weights and from random ones
    OUTPUT/upernet/    upernet-scratch/
    OUTPUT/evaluation/*.json              scores on scenes of unseen concepts        OUTPUT/predictions/  some drawn

OUTPUT is a run of `internimage demo`. Run again, it goes on where it was.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.configuration import load_config
from pretrain.demo import commands
from pretrain.demo.commands import Job
from pretrain.demo.scenes import build_scenes
from pretrain.finetuning.derive import image_model_of
from pretrain.training.checkpoint import disk

COUNTS = {"train": 600, "validation": 100, "held-out": 200}
RECIPES = {"mask-rcnn": ("demo_mask_rcnn", "objects", "objects"), "upernet": ("demo_upernet", "labels", "label_maps")}


def fine_tuning(source: Path, config: str, kind: str, scenes: Path) -> list[str]:
    """`config` and its overrides, to fine-tune the image model of the run `source`, whatever that run's recipe was."""
    model = image_model_of(disk.find_checkpoint(source, disk.AUTO).config)
    return [
        config,
        f"data.sources.0.path={scenes / kind}",
        f"model.name={model['name']}",
        f"model.overrides={json.dumps(model['overrides'])}",
    ]


def walk_dense(output: Path, overrides: tuple[str, ...] = (), counts: dict[str, int] = COUNTS) -> int:
    """Fine-tune and score both tasks from the demo's weights and from random ones; the exit code.

    overrides: of both fine-tunings, as `schedule.steps=20`. Raises UserError where OUTPUT holds no demo.
    """
    began, shards = time.monotonic(), output / "shards"
    if not disk.complete_checkpoints(output) or not shards.is_dir():
        raise UserError(f"{output}: holds no finished pretraining; run `internimage demo --output {output}` first")
    print("[1/4] Scenes of drawings", flush=True)
    for split, folder in build_scenes(shards, output / "scenes", counts=counts).items():
        print(f"{split}: {counts[split]} scenes, {folder}")
    for number, (name, (config, kind, _)) in enumerate(RECIPES.items(), 2):
        print(f"[{number}/4] {name} from the pretrained backbone, and the same from random weights", flush=True)
        jobs = [_job(output, name, config, kind, overrides, pretrained=pretrained) for pretrained in (True, False)]
        for job, code in zip(jobs, commands.run_side_by_side(jobs, threads=1), strict=True):
            commands.check(code, f"{job.title} ({job.run / 'output.log'})")
    print("[4/4] Scores on scenes of unseen concepts, and the report", flush=True)
    results = [_score(output, name, kind, evaluation) for name, (_, kind, evaluation) in RECIPES.items()]
    from pretrain.evaluation import summary
    from pretrain.evaluation.predict import predict_pictures
    from pretrain.report import write_report

    for name in RECIPES:
        pictures = sorted((output / "scenes" / "held-out" / "images").glob("*.png"))[:8]
        predict_pictures(output / name, pictures, output / "predictions" / name)
    for row in summary(results):
        print("  ".join(row))
    print(f"{write_report(output)} (open it in a browser); {(time.monotonic() - began) / 60:.1f} minutes in all")
    sys.stdout.flush()
    return commands.DONE


def _job(output: Path, name: str, config: str, kind: str, overrides: tuple[str, ...], *, pretrained: bool) -> Job:
    run = output / (name if pretrained else f"{name}-scratch")
    arguments = ["finetune", *fine_tuning(output, config, kind, output / "scenes" / "train"), *overrides]
    arguments += ["--output", str(run)]
    arguments += ["--processes", "1", *(["--from", str(output)] if pretrained else [])]
    steps = load_config(config, overrides).schedule.steps or 0
    return Job(f"{name}, {'pretrained' if pretrained else 'random weights'}", tuple(arguments), run, steps)


def _score(output: Path, name: str, kind: str, evaluation: str) -> dict[str, Any]:
    """The pretrained run's scores on the held-out scenes, with the random one's beside them, written into OUTPUT."""
    from pretrain.evaluation import evaluate, put_beside, write_result

    found = {
        run: evaluate(output / run, output / "scenes" / "held-out" / kind, untrained=False, say=print)[evaluation]
        for run in (name, f"{name}-scratch")
    }
    result = put_beside({**found[name], "title": name}, "random weights", found[f"{name}-scratch"])
    write_result(output, f"unseen-{name}", result)
    return result
