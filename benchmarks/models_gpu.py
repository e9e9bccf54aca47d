"""InternImage T, B and H on a GPU: images a second and peak memory, forward pass and training step, beside peers.

    python benchmarks/models_gpu.py                                     # T and B at 224 px, H at 640, bf16
    python benchmarks/models_gpu.py --models B --peer public=my_peers:build
    python benchmarks/models_gpu.py --device cpu --tiny --batch 2       # does it run? no figures worth keeping

A peer is a function (name, size) -> module of the same input, as ("internimage_b", 224); it may return None for what it
does not have. Wrap the public model with its CUDA operator in your own environment in a few lines. Contenders take
turns; a ratio is the median over the rounds, with quartiles. Weights stay fp32 under autocast; a step has AdamW and the
published drop path. Memory is the peak that torch's allocator saw, above the weights and optimizer states that are held
throughout. Results: benchmarks/results/models_gpu.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import nn

from dcnv3 import available_backends
from pretrain.models import create_model

Build = Callable[[str, int], nn.Module | None]
MODELS = {"T": ("internimage_t", 224, 128), "B": ("internimage_b", 224, 64), "H": ("internimage_h", 640, 4)}
TINY = {"channels": 16, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8), "level2_post_norm_block_ids": (1,)}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Contender:
    """A model on the device with its optimizer, and what one forward pass or step of it takes."""

    def __init__(self, model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> None:
        self.model, self.images, self.dtype = model.to(images.device), images, dtype
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def forward(self) -> None:
        self.model.eval()
        with torch.inference_mode(), self.autocast():
            self.model(self.images)

    def step(self) -> None:
        self.model.train()
        with self.autocast():
            loss = nn.functional.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def spent(run: Callable[[], None], device: torch.device) -> tuple[float, int]:
    """(seconds, bytes above what was held before at the peak; 0 where the device does not tell)."""
    gpu = device.type == "cuda"
    held = 0
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    started = time.perf_counter()
    run()
    if gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, torch.cuda.max_memory_allocated(device) - held if gpu else 0


def compare(contenders: dict[str, Contender], kind: str, rounds: int) -> dict[str, Any]:
    """By turns, two rounds of warming up. A contender that fails (no memory) is recorded with its error and dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peak: dict[str, int] = {}
    errors: dict[str, str] = {}
    for turn in range(rounds + 2):
        for name, contender in contenders.items():
            if name in errors:
                continue
            try:
                took, memory = spent(getattr(contender, kind), contender.images.device)
            except RuntimeError as error:
                errors[name] = str(error).splitlines()[0]
                contender.optimizer.zero_grad(set_to_none=True)
                continue
            if turn >= 2:
                seconds[name].append(took)
                peak[name] = max(memory, peak.get(name, 0))
    result: dict[str, Any] = {f"{name}_error": error for name, error in errors.items()}
    for name in contenders.keys() - errors.keys():
        model = contenders[name].model
        own = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
        result[name] = {
            "images_per_second": round(len(contenders[name].images) / statistics.median(seconds[name]), 2),
            "peak_mb_above_held": round(peak[name] / 1e6, 1),
            "weights_mb": round(own / 1e6, 1),
        }
        if name != "ours" and "ours" not in errors:
            ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds[name], strict=True)]
            low, middle, high = statistics.quantiles(ratios)
            result[name]["takes_of_ours"] = round(middle, 3)
            result[name]["quartiles"] = [round(low, 3), round(high, 3)]
    return result


def ours(name: str, tiny: bool) -> nn.Module:
    model = create_model(name, **(TINY if tiny else {}))
    for key, parameter in model.named_parameters():
        if "offset_mask" in key:  # at initialisation every offset is zero: sampling would be an aligned copy
            nn.init.normal_(parameter, std=0.02 if parameter.ndim > 1 else 1.0)
    return model


def peer(text: str) -> tuple[str, Build]:
    name, _, target = text.partition("=")
    module, _, function = target.partition(":")
    if not function:
        raise argparse.ArgumentTypeError(f"expected NAME=MODULE:FUNCTION, got {text!r}")
    return name, getattr(importlib.import_module(module), function)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch", type=int, help="128, 64 and 4 for T, B and H")
    parser.add_argument("--size", type=int, help="224, 224 and 640")
    parser.add_argument("--dtype", default="bfloat16", choices=list(TYPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="ours with few channels and blocks, to see that it runs")
    parser.add_argument("--peer", action="append", default=[], type=peer, metavar="NAME=MODULE:FUNCTION")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "models_gpu.json")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds: quartiles need two or more")
    device = torch.device(options.device)
    reason = available_backends().get(device.type)
    if reason is not None:
        raise SystemExit(f"the {device.type} operator cannot run here: {reason}")
    about, rows = machine(device=str(device)), []
    for key in options.models:
        name, size, batch = MODELS[key]
        size, batch = options.size or size, options.batch or batch
        torch.manual_seed(0)
        images = torch.randn(batch, 3, size, size, device=device)
        built = {"ours": ours(name, options.tiny), **{other: build(name, size) for other, build in options.peer}}
        dtype = TYPES[options.dtype]
        contenders = {other: Contender(model, images, dtype) for other, model in built.items() if model is not None}
        row: dict[str, Any] = {
            "model": name,
            "tiny": options.tiny,
            "size": size,
            "batch": batch,
            "dtype": options.dtype,
        }
        row |= {kind: compare(contenders, kind, options.rounds) for kind in ("forward", "step")}
        rows.append(row)
        print(json.dumps(row), flush=True)
        del built, contenders
    options.output.parent.mkdir(parents=True, exist_ok=True)
    whole = {"benchmark": "models_gpu", "machine": about, "rounds": options.rounds, "rows": rows}
    options.output.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
