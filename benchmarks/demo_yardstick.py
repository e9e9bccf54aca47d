"""A plain CLIP + category ResNet on the demo's drawings, at the demo's time: what the demo's model must beat.

    python benchmarks/demo_yardstick.py RUN [--cpu-seconds 720] [--threads 2] [--seeds 3] [--held-out]

RUN is a demo's folder (internimage demo --output RUN): its shards are read, its augmentation is taken over, and its
scores are put beside. The model is timm's resnet10t (5 M parameters) with a linear projection, a bag of words for the
text, softmax contrast and a category head; AdamW 1e-3, cosine. No code of this project but the reader and the scores.
Time is counted in CPU seconds of this process (the demo's pretraining takes about 720 on two cores), so that other work
on the machine does not count. Scores are those of the validation sets, with --held-out of the held-out ones: these are
looked at once. Result: results/demo_yardstick.json.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from machine import machine
from torch import Tensor, nn

from data_pipeline.reading import ImageText, Reader, normalize
from pretrain.configuration import RunConfig, load_config
from pretrain.evaluation import read_results
from pretrain.evaluation.classification import top1, zero_shot
from pretrain.evaluation.retrieval import retrieval
from pretrain.evaluation.sets import describe_set

WORDS, LENGTH, WIDTH, BATCH, LR = 8192, 24, 192, 128, 1e-3
SETS = {"another artist": "{}-artist", "unseen concepts": "{}"}
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


def scores(model: Plain, config: RunConfig, shards: Path, split: str) -> dict[str, float]:
    """{what was withheld: score: value}, flattened."""
    found = {}
    for title, pattern in SETS.items():
        folder = shards / pattern.format(split)
        names = describe_set(folder).class_names()
        for result in (
            retrieval(model, folder, config, tokenizer=words, examples=0),
            zero_shot(model, folder, config, tokenizer=words),
            top1(model, folder, config, classes=names),
        ):
            found |= {f"{title}: {result['title']}: {one['title']}": one["value"] for one in result["scores"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--cpu-seconds", type=float, default=720.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine("timm")
    config = load_config("demo")
    shards, split = options.run / "shards", "held-out" if options.held_out else "validation"
    seeds = []
    for seed in range(options.seeds):
        model, steps = train(config, shards / "train", seed, options.cpu_seconds)
        seeds.append({"seed": seed, "steps": steps, **scores(model, config, shards, split)})
        print(f"seed {seed}: {steps} steps of {BATCH}", flush=True)
    ours = {
        f"{result['set']}: {result['title']}: {one['title']}": one["value"]
        for result in read_results(options.run).values()
        for one in result["scores"]
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "machine": about, "cpu_seconds": options.cpu_seconds, "split": split,
        "parameters": sum(p.numel() for p in model.parameters()), "yardstick": seeds, "demo": ours,
    }  # fmt: skip
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    for name in (key for key in seeds[0] if ":" in key):
        values = [one[name] for one in seeds]
        spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        print(f"{name:90s} {sum(values) / len(values):.3f}{spread}")


if __name__ == "__main__":
    main()
