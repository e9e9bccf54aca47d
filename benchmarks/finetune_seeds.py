"""Does pretraining help? Fine-tuned from a pretrained run against random weights trained to their plateau, over seeds.

    python benchmarks/finetune_seeds.py RUN --data SETS [--seeds 0 1 2] [--random-lr 3e-3 ...]
                                       [--pretrained-lr 3e-4 ...] [KEY=VALUE ...]

RUN is a pretraining run directory; SETS holds train/, validation/ and held-out/ (an empty one gets the embedded set).
Rates, lengths and segments are chosen on validation; held-out is scored once a seed. Killed, it goes on.
Results: benchmarks/results/finetune_seeds.json, and RUN/evaluation/finetuned.json for the report.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import machine

from pretrain.evaluation import write_result
from pretrain.finetuning.comparison import arms, comparison_result, run_arm, verdict
from pretrain.finetuning.derive import classifier_config
from pretrain.training.checkpoint.disk import find_checkpoint

DEFAULTS = {
    "optimizer.lr": 1e-3,
    "optimizer.layer_decay": 0.8,
    "schedule.warmup_steps": 20,
    "task.label_smoothing": 0.1,
    "training.ema.decay": 0.98,
    "training.log_every": 20,
}


def sets(folder: Path) -> tuple[Path, Path, Path]:
    if not (folder / "train").is_dir():
        from data_pipeline.preparation.sources.openmoji import build_openmoji

        build_openmoji(folder)
    return folder / "train", folder / "validation", folder / "held-out"


def shown(arm: dict[str, Any]) -> str:
    runs = ", ".join(f"{run['top1']:.3f} ({run['steps']} steps)" for run in arm["runs"])
    return f"{arm['arm']:15} mean {arm['mean']:.3f}  range {arm['range']:.3f}  [{runs}]  {arm['chosen']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("changes", nargs="*", metavar="key.path=value", help="of the fine-tuning configuration")
    parser.add_argument("--data", type=Path, required=True, metavar="SETS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--random-lr", type=float, nargs="*", default=[3e-3], help="more rates for random weights")
    parser.add_argument("--pretrained-lr", type=float, nargs="*", default=[3e-4], help="more for the pretrained ones")
    parser.add_argument("--segment", type=int, default=50, help="steps between two looks at validation")
    parser.add_argument("--patience", type=int, default=4, help="segments without a new best that end a run")
    parser.add_argument("--least", type=int, default=300, help="steps before which no run ends")
    parser.add_argument("--most", type=int, default=1000, help="longest run, steps")
    parser.add_argument("--work", type=Path, help="folder of the runs [default: RUN/finetune-seeds]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/finetune_seeds.json")
    arguments = parser.parse_intermixed_args()

    about = machine(device="cuda" if torch.cuda.is_available() else "cpu")
    train, validation, held_out = sets(arguments.data)
    changes = DEFAULTS | {key: yaml.safe_load(value) for key, _, value in (c.partition("=") for c in arguments.changes)}
    checkpoint = find_checkpoint(arguments.run)
    config = classifier_config(checkpoint.config, train=train, steps=arguments.most, changes=changes)
    work = arguments.work or arguments.run / "finetune-seeds"
    started, found = time.time(), []
    for arm in arms(config, arguments.run, arguments.random_lr, arguments.pretrained_lr):
        found.append(
            run_arm(
                arm,
                output=work,
                validation=validation,
                held_out=held_out,
                seeds=arguments.seeds,
                segment_steps=arguments.segment,
                patience=arguments.patience,
                least_steps=arguments.least,
            )
        )
        print(shown(found[-1]), flush=True)
    pretrained, random = found
    gain = verdict(pretrained, random)
    result = comparison_result(pretrained, random)
    top1 = next(entry for entry in result["scores"] if entry["name"] == "top1")
    print(
        f"gain {gain['gain']:+.3f}, {'above' if gain['above_range'] else 'within'} the range over seeds "
        f"{gain['range_over_seeds']:.3f}; chance {top1['chance']:.3f}, "
        f"largest category {top1['beside']['largest category']:.3f}; {result['samples']} held-out samples"
    )
    write_result(arguments.run, "finetuned", result)
    content = {
        **gain,
        "chance": top1["chance"],
        "largest_category": top1["beside"]["largest category"],
        "held_out_samples": result["samples"],
        "arms": [{key: value for key, value in arm.items() if key != "result"} for arm in found],
        "pretraining_step": checkpoint.step,
        "configuration": config.model_dump(mode="json", exclude={"data": {"sources"}}),
        "seconds": round(time.time() - started, 1),
        "machine": about,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
