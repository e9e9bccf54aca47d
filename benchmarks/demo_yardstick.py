"""The demo's pretraining beside a plain CLIP + category ResNet, at equal time on the same machine.

    python benchmarks/demo_yardstick.py FOLDER [--seeds 3] [--threads 2] [--held-out] [KEY=VALUE ...]

FOLDER gets the embedded set and a run of the demo's recipe a seed, as `internimage demo` makes them (KEY=VALUE changes
that recipe); then, for as many CPU seconds as the run took, the yardstick trains: timm's resnet10t (5 M parameters)
with a linear projection, a bag of words for the text, softmax contrast and a category head; AdamW 1e-3, cosine, the
demo's augmentation. Of this project it uses the reader and the scores alone. CPU seconds are counted, start included,
so that other work on the machine hardly counts. Stopped, the same command goes on behind the last finished run.

Scores are those of the validation sets, with --held-out of the held-out ones: these are looked at once.
Result: results/demo_yardstick.json.
"""

import argparse
import json
import math
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from machine import machine
from torch import Tensor, nn

from data_pipeline.preparation.sources import openmoji
from data_pipeline.reading import ImageText, Reader, normalize
from pretrain.configuration import RunConfig, load_config
from pretrain.demo.walk import DRAWINGS_A_CONCEPT, PRETRAINING
from pretrain.evaluation import load_module
from pretrain.evaluation.classification import top1, zero_shot
from pretrain.evaluation.retrieval import retrieval
from pretrain.evaluation.sets import describe_set

WORDS, LENGTH, WIDTH, BATCH, LR = 8192, 24, 192, 128, 1e-3
SETS = {"another artist": "{}-artist", "unseen concepts": "{}"}
Scores = dict[str, float]
RESULT = Path(__file__).parent / "results" / "demo_yardstick.json"


def words(captions: Sequence[str]) -> Tensor:
    """int64 [n, LENGTH]: a number for each word, 0 where there is none."""
    rows = []
    for caption in captions:
        found = [
            1 + sum(ord(c) * 31**i for i, c in enumerate(w)) % (WORDS - 1) for w in re.findall(r"\w+", caption.lower())
        ]
        rows.append((found + [0] * LENGTH)[:LENGTH])
    return torch.tensor(rows)


class Plain(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.resnet = timm.create_model("resnet10t", num_classes=0)
        self.project = nn.Linear(512, WIDTH)
        self.words = nn.EmbeddingBag(WORDS, WIDTH, mode="mean", padding_idx=0)
        self.category = nn.Linear(512, classes)
        self.scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
        nn.init.normal_(self.words.weight, std=0.02)

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.project(self.resnet(images)), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.words(tokens), dim=-1)

    def classify(self, images: Tensor) -> Tensor:
        logits: Tensor = self.category(self.resnet(images))
        return logits


def train(config: RunConfig, train_set: Path, seed: int, seconds: float) -> tuple[Plain, int]:
    """The model after `seconds` of CPU time, and its steps."""
    torch.manual_seed(seed)
    classes = len(describe_set(train_set).class_names())
    data = config.data.model_copy(deep=True)
    data.sources[0].path, data.views, data.workers, data.context_length = str(train_set), 1, 0, LENGTH
    reader = Reader(data, ImageText(words, LENGTH), batch_size=BATCH, accumulation=1, rank=0, world_size=1, seed=seed)
    model = Plain(classes).train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.05)
    began, steps = time.process_time(), 0
    for batch in reader.batches(0):
        share = (time.process_time() - began) / seconds
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (steps + 1) / 40) * (1 + math.cos(math.pi * share)) / 2
        features = model.resnet(normalize(batch.views[:, 0], data.mean, data.std))
        image, text = F.normalize(model.project(features), dim=-1), model.encode_text(batch.targets.tokens)
        logits = image @ text.T * model.scale.exp().clamp(max=100)
        same = (batch.targets.tokens[:, None] == batch.targets.tokens[None]).all(-1)
        logits = logits.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool), -1e4)
        own = torch.arange(len(logits))
        contrast = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        category = F.cross_entropy(model.category(features), batch.targets.labels, label_smoothing=0.1)
        optimizer.zero_grad()
        (contrast + category).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        steps += 1
    reader.close()
    return model.eval(), steps


def train_demo(output: Path, shards: Path, seed: int, changes: Sequence[str]) -> float:
    """Train the demo's recipe into `output`; the CPU seconds of its processes."""
    taken = output / "cpu_seconds.json"
    if not taken.exists():
        words = ["pretrain", PRETRAINING, f"data.sources.0.path={shards / 'train'}", f"training.seed={seed}", *changes]
        words += ["--output", str(output), "--processes", "2"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "launch", *words], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.write_text(json.dumps(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime))
    return float(json.loads(taken.read_text()))


def scores(model: Any, tokenizer: Callable[[list[str]], Tensor], config: RunConfig, shards: Path, split: str) -> Scores:
    """{what was withheld: score: value}, flattened."""
    found = {}
    for title, pattern in SETS.items():
        folder = shards / pattern.format(split)
        names = describe_set(folder).class_names()
        for result in (
            retrieval(model, folder, config, tokenizer=tokenizer, examples=0),
            zero_shot(model, folder, config, tokenizer=tokenizer),
            top1(model, folder, config, classes=names),
        ):
            found |= {f"{title}: {result['title']}: {one['title']}": one["value"] for one in result["scores"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=2, help="of the yardstick; the demo has two processes")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine("timm")
    config = load_config(PRETRAINING, tuple(options.changes))
    shards, split = options.folder / "shards", "held-out" if options.held_out else "validation"
    openmoji.build_openmoji(shards, drawings_a_concept=DRAWINGS_A_CONCEPT)
    seeds = []
    for seed in range(options.seeds):
        run = options.folder / f"demo-{seed}"
        seconds = train_demo(run, shards, seed, options.changes)
        model, steps = train(config, shards / "train", seed, seconds)
        own = load_module(run)
        tokenizer = config.task.tokenizer(config.data)
        row = {
            "seed": seed,
            "cpu_seconds": round(seconds, 1),
            "yardstick_steps": steps,
            "demo_steps": own.checkpoint.step,
        }
        row["demo"] = scores(own.module, tokenizer, own.config, shards, split)
        row["yardstick"] = scores(model, words, config, shards, split)
        seeds.append(row)
        print(
            f"seed {seed}: {seconds:.0f} CPU seconds, {row['demo_steps']} steps of the demo, {steps} of the yardstick"
        )
    sizes = {"demo": own.module.image, "yardstick": model.resnet}
    content = {
        "machine": about, "changes": options.changes, "split": split, "seeds": seeds,
        "parameters": {name: sum(p.numel() for p in image.parameters()) for name, image in sizes.items()},
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{'':90s} demo - yardstick, demo, yardstick")
    for name in seeds[0]["demo"]:
        ours, theirs = ([one[who][name] for one in seeds] for who in ("demo", "yardstick"))
        means = [sum(values) / len(values) for values in (ours, theirs)]
        print(f"{name:90s} {means[0] - means[1]:+.3f}  {_spread(means[0], ours)}  {_spread(means[1], theirs)}")


def _spread(mean: float, values: Sequence[float]) -> str:
    return f"{mean:.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
