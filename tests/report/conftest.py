"""A run directory with everything a report can show: 400 steps, one stop, bad samples, scores, samples."""

import base64
import io
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1] / "handoff"))  # for checkpoints

from pretrain.training.logging.kinds import EventKind
from pretrain.training.logging.record import EventLog


def picture(colour: tuple[int, int, int]) -> str:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((6, 6, 58, 58), fill=colour)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def metric_row(step: int, draw: random.Random, start: float = 1_760_000_000.0) -> dict[str, float]:
    falling = math.exp(-step / 120)
    parts = {"loss/intra": 0.9 + 0.9 * falling, "loss/inter": 1.0 + 0.9 * falling, "loss/text": 1.4 + 2.6 * falling}
    parts = {name: value + draw.gauss(0, 0.05) for name, value in parts.items()}
    return {
        "step": step,
        "time": start + step * 0.9 + (30 if step > 200 else 0),
        "loss": sum(parts.values()),
        **parts,
        **{name.replace("loss/", "weighted/"): value for name, value in parts.items()},
        "text/accuracy": 0.6 * (1 - falling),
        "category/accuracy": 0.11 + 0.5 * (1 - falling),
        "intra/rank": 20 + 90 * (1 - falling),
        "inter/rank": 20 + 70 * (1 - falling),
        "lr": 1e-3 * min(step / 40, 0.5 + 0.5 * math.cos(math.pi * step / 400)),
        "grad_norm": 1 + 9 * falling + abs(draw.gauss(0, 0.4)),
        "images_per_second": 140 + draw.gauss(0, 6),
        "step_ms": 910 + draw.gauss(0, 30),
        "data_wait_ms": 12 + abs(draw.gauss(0, 5)),
        "memory_mb": 1320,
    }


def write_events(run: Path, *events: tuple[float, EventKind | dict[str, Any], dict[str, Any]]) -> None:
    """(time, kind, what else) as the product's own log writes them."""
    log = EventLog(run, rank=0)
    for when, kind, what in events:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pretrain.training.logging.record.time.time", lambda now=when: now)
            log(kind, **what)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "demo"
    (run / "evaluation").mkdir(parents=True)
    (run / "finetune").mkdir()
    draw = random.Random(0)
    rows = [metric_row(step, draw) for step in range(2, 401, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "finetune/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:60]))
    start = rows[0]["time"] - 4
    history = [{"step": 40, "top1": 0.3}, {"step": 80, "top1": 0.5}, {"step": 120, "top1": 0.52}]
    (run / "finetune/validation.json").write_text(json.dumps(history))
    (run / "random/seed-0").mkdir(parents=True)
    (run / "random/seed-0/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:80]))
    history = [{"step": step, "top1": 0.1 + step / 500} for step in (40, 80, 120, 160)]
    (run / "random/seed-0/validation.json").write_text(json.dumps(history))
    checkpoint = EventKind.CHECKPOINT
    bad = {"kind": EventKind.BAD_SAMPLE, "step": 128, "shard": "00001.tar", "key": "1F3FB", "reason": "not an image"}
    write_events(
        run,
        (start, EventKind.START, {"step": 0, "ranks": 2}),
        (start + 90, checkpoint, {"step": 100, "bytes": 7}),
        (start + 120, bad, {}),
        (start + 180, checkpoint, {"step": 200, "bytes": 7}),
        (start + 181, EventKind.STOPPED, {"reason": "SIGUSR1"}),
        (start + 211, EventKind.RESUME, {"step": 200, "ranks": 2}),
        (rows[-1]["time"] + 3, EventKind.DONE, {"reason": None}),
    )
    (run / "config.yaml").write_text(
        "model: {name: custom}\ntask: {name: pretraining, preset: m3i}\ndata: {image_size: 64}\n"
        "schedule: {steps: 400}\n"
        "training: {batch_size: 128, zero_stage: 2, precision: fp32}\n"
    )
    (run / "environment.json").write_text(
        json.dumps({"ranks": 2, "packages": {"torch": "2.15.0", "deepspeed": "0.19.8"}})
    )
    retrieval = {
        "task": "retrieval",
        "title": "Image-text retrieval",
        "set": "held-out",
        "samples": 190,
        "weights": "teacher",
        "scores": [
            {
                "name": "i2t_recall@1",
                "title": "image to text, recall@1",
                "value": 0.12,
                "interval": [0.08, 0.17],
                "chance": 0.005,
                "beside": {"untrained": 0.006},
            },
            {
                "name": "i2t_recall@5",
                "title": "image to text, recall@5",
                "value": 0.30,
                "interval": [0.24, 0.37],
                "chance": 0.026,
                "beside": {"untrained": 0.031},
            },
            {
                "name": "t2i_recall@5",
                "title": "text to image, recall@5",
                "value": 0.28,
                "interval": [0.22, 0.35],
                "chance": 0.026,
                "beside": {"untrained": 0.024},
            },
        ],
        "examples": [
            {
                "key": key,
                "caption": caption,
                "image": picture(colour),
                "place": 41 if caption.startswith(("blue", "yellow")) else 1 + (caption != "green circle"),
                "candidates": 190,
                "retrieved": [
                    {"caption": "green circle", "score": 0.41, "correct": caption == "green circle"},
                    {"caption": "red circle <symbol>", "score": 0.33, "correct": caption == "red circle <symbol>"},
                    {"caption": "waxing crescent moon, travel and places", "score": 0.28, "correct": False},
                ],
            }
            for key, caption, colour in [
                ("1F7E2", "green circle", (60, 170, 90)),
                ("1F534", "red circle <symbol>", (210, 60, 60)),
                ("1F535", "blue circle", (60, 90, 210)),
                ("1F7E1", "yellow circle", (240, 200, 60)),
            ]
        ],
        "attribution": "OpenMoji 17.0.0, the open-source emoji and icon project, licence CC BY-SA 4.0",
    }
    top1 = {
        "task": "top1",
        "title": "Fine-tuned classification",
        "set": "held-out",
        "samples": 190,
        "weights": "ema",
        "scores": [
            {
                "name": "top1",
                "title": "top-1 accuracy",
                "value": 0.63,
                "interval": [0.56, 0.7],
                "chance": 1 / 9,
                "beside": {"largest category": 0.2, "from random weights": 0.55},
            }
        ],
        "confusion": {"classes": ["Animals & Nature", "Symbols"], "counts": [[21, 9], [7, 31]]},
        "calibration_error": 0.043,
        "per_class": {"Animals & Nature": {"value": 0.7, "samples": 30}, "Symbols": {"value": 0.8, "samples": 38}},
    }
    (run / "evaluation/retrieval.json").write_text(json.dumps(retrieval))
    (run / "evaluation/top1.json").write_text(json.dumps(top1))
    return run
