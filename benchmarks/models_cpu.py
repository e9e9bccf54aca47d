"""InternImage-T on the CPU against timm's convnext_tiny and swin_tiny: forward and training step at 224 px, in one run.

    python benchmarks/models_cpu.py [--batch 8] [--rounds 9] [--threads 2] [--out benchmarks/results/models_cpu.json]

The models take turns, so that a slow minute of the machine meets all of them; the figure is the median of the rounds,
the ratio the median of the rounds' ratios, with their quartiles. The load average is that before the first round.
Offsets are not zero (at initialisation they would be, and the sampling would be an aligned copy).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from machine import machine
from torch import nn

import pretrain.models  # noqa: F401  registers internimage_t
from dcnv3 import available_backends

NAMES = {
    "internimage_t": "internimage_t",
    "convnext_tiny": "convnext_tiny",
    "swin_tiny": "swin_tiny_patch4_window7_224",
}
LIMITS = {"forward": 1.3, "step": 1.5}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(NAMES[name], drop_path_rate=0.1)
    for key, parameter in model.named_parameters():
        if ".offset." in key or ".mask." in key:
            nn.init.normal_(parameter, std=0.02 if parameter.ndim > 1 else 1.0)
    return model


def forward(model: nn.Module, images: torch.Tensor) -> None:
    model.eval()
    with torch.inference_mode():
        model(images)


def step(model: nn.Module, images: torch.Tensor) -> None:
    model.train()
    model.zero_grad(set_to_none=True)
    labels = torch.zeros(len(images), dtype=torch.int64)
    nn.functional.cross_entropy(model(images), labels).backward()


def interleaved(
    models: dict[str, nn.Module], run: Callable[..., None], images: torch.Tensor, rounds: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 1):
        for name, model in models.items():
            started = time.perf_counter()
            run(model, images)
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(given)
    if arguments.rounds < 2:
        parser.error("--rounds: quartiles need two or more")
    torch.set_num_threads(arguments.threads)
    about = machine("timm")
    reason = available_backends()["cpu"]
    if reason:
        raise SystemExit(f"the compiled CPU operator is not here: {reason}")
    models = {name: build(name) for name in NAMES}
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    results: dict[str, object] = {
        "machine": about,
        "batch": arguments.batch,
        "size": arguments.size,
        "rounds": arguments.rounds,
    }
    for kind, run in (("forward", forward), ("step", step)):
        seconds = interleaved(models, run, images, arguments.rounds)
        ours = seconds["internimage_t"]
        result: dict[str, object] = {}
        for name, times in seconds.items():
            low, ratio, high = statistics.quantiles([a / b for a, b in zip(ours, times, strict=True)])
            result[name] = {
                "ms_an_image": round(statistics.median(times) * 1e3 / arguments.batch, 2),
                "internimage_t_takes": round(ratio, 3),
                "quartiles": [round(low, 3), round(high, 3)],
            }
            cost = statistics.median(times) * 1e3 / arguments.batch
            print(
                f"{kind:8} internimage_t / {name:14} {ratio:5.2f} ({low:.2f} to {high:.2f})   {cost:7.2f} ms an image"
            )
        result["limit_over_convnext_tiny"] = LIMITS[kind]
        results[kind] = result
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
