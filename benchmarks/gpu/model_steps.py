"""Training steps of InternImage T, B and H beside ConvNeXts of like size: images a second, memory, MFU.

    python benchmarks/gpu/model_steps.py T B            eager; H also with recomputation in the backward pass
    python benchmarks/gpu/model_steps.py --compile T    eager and compiled, as `model.compile` does it

One row a contender. FLOPs of ours are those of pretrain.models.counting, a peer's what torch counts; MFU is their share
of H100's dense bf16 peak. floor_ms is a step with two images: what launches cost whatever the GPU does. Memory is the
peak of the allocator above what others held.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from model_step import (
    PEAK_TFLOPS,
    ModelStep,
    device_here,
    flops_of,
    flops_of_peer,
    internimage,
    summary,
    synchronize,
    take_turns,
)
from needs import packages
from record import headline, record, small

from pretrain.models.compilation import compile_regions

SIZE = 224
PEERS = {"T": "convnext_tiny", "B": "convnext_base", "H": "convnext_xlarge"}
DROP_PATH = {"T": 0.1, "B": 0.5, "H": 0.2}  # as published for ours, for the peer alike
BATCH = {"T": 256, "B": 128, "H": 48}
RECOMPUTED_BATCH = {"H": 128}
RECOMPUTED, COMPILED = "recomputed", "compiled"


class Bench:
    """One letter's contenders, measured in turns."""

    def __init__(self, step: str, letter: str, *, tiny: bool) -> None:
        self.step, self.letter, self.tiny = step, letter, tiny
        self.device = device_here()
        self.size = 64 if tiny else SIZE
        self.flops = flops_of(letter, self.size, tiny=tiny)
        self.contenders: dict[str, ModelStep] = {}
        self.about: dict[str, dict[str, Any]] = {}

    def add(self, name: str, batch: int, *, peer: str | None = None, compiled: bool = False) -> None:
        """Build a contender and run it twice. What does not fit is tried with half the batch, down to an eighth."""
        batch = 2 if self.tiny else batch
        error = ""
        for size in (batch, batch // 2, batch // 4, batch // 8):
            if size < 1:
                break
            try:
                return self._add(name, size, peer, compiled)
            except torch.OutOfMemoryError as problem:
                error = str(problem).splitlines()[0]
            gc.collect()
            torch.cuda.empty_cache()
        record(self.step, {"model": self.letter, "contender": name, "error": error})

    def _add(self, name: str, batch: int, peer: str | None, compiled: bool) -> None:
        cuda = self.device.type == "cuda"
        held = torch.cuda.memory_allocated(self.device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        if peer is None:
            flops = self.flops
            ours = internimage(self.letter, self.device, tiny=self.tiny)
            ours.set_grad_checkpointing(name == RECOMPUTED)
            model: torch.nn.Module = ours
        else:
            import timm

            flops = flops_of_peer(peer, self.size)
            with self.device:
                model = timm.create_model(peer, num_classes=1000, drop_path_rate=DROP_PATH[self.letter])
            model.to(memory_format=torch.channels_last)
        if compiled:
            # On a CPU the compiler would take minutes.
            compile_regions(model, backend="eager" if self.tiny else "inductor")
        contender = ModelStep(model, batch, self.size, self.device)
        started = time.perf_counter()
        for _ in range(2):
            contender()
        synchronize(self.device)
        self.contenders[name] = contender
        self.about[name] = {
            "model": self.letter,
            "contender": peer or name,
            "size": self.size,
            "batch": batch,
            "parameters_m": round(contender.parameters / 1e6, 1),
            "gflop_per_image": round(flops / 1e9, 2),
            "first_two_steps_s": round(time.perf_counter() - started, 1),
            "peak_gb": round((torch.cuda.max_memory_allocated(self.device) - held) / 1e9, 2) if cuda else None,
        }

    def measure(self, turns: int, steps: int) -> dict[str, float]:
        """Rows of all contenders; images a second by name."""
        spent = take_turns(self.contenders, turns, steps)
        speed = {}
        for name, its in spent.items():
            about = self.about[name]
            row = about | summary(its, about["batch"])
            tflops = about["gflop_per_image"] * row["images_per_second"] / 1e3
            row |= {"tflops": round(tflops, 1), "mfu": round(tflops / PEAK_TFLOPS, 4)}
            speed[name] = row["images_per_second"]
            if name != COMPILED:  # another batch would be compiled anew
                self.contenders[name].shrink(2)
                floor = take_turns({name: self.contenders[name]}, 2 if self.tiny else 5, 1)[name]
                row["floor_ms"] = round(1e3 * statistics.median(floor), 2)
            record(self.step, row)
        return speed

    def close(self) -> None:
        self.contenders.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(PEERS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="no further model is begun after these")
    parser.add_argument("--small", action="store_true", help="tiny models: does it run?")
    options = parser.parse_args()
    step = "compiled" if options.compile else f"steps-{''.join(options.models)}"
    tiny, began, words = small(), time.perf_counter(), []
    turns, steps = (2, 1) if tiny else (7, 3)
    with packages(step):
        for letter in options.models:
            if time.perf_counter() - began > options.seconds:
                record(step, {"model": letter, "error": "no time left"})
                continue
            bench = Bench(step, letter, tiny=tiny)
            bench.add("ours", BATCH[letter])
            if options.compile:
                bench.add(COMPILED, BATCH[letter], compiled=True)
                record(step, {"model": letter} | compiled_graphs())
            else:
                bench.add("peer", BATCH[letter], peer="test_convnext" if tiny else PEERS[letter])
            words.append(said(letter, bench, bench.measure(turns, steps)))
            headline(step, "; ".join(words))
            bench.close()
            if letter in RECOMPUTED_BATCH and not options.compile:
                bench.add(RECOMPUTED, RECOMPUTED_BATCH[letter])
                words.append(said(f"{letter} recomputing", bench, bench.measure(max(2, turns // 2), steps)))
                headline(step, "; ".join(words))
                bench.close()


def compiled_graphs() -> dict[str, Any]:
    """What was captured since the last call: graphs, and why they were broken."""
    from torch._dynamo.utils import counters

    found = {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": dict(counters["graph_break"]),
    }
    counters.clear()
    return found


def said(letter: str, bench: Bench, speed: dict[str, float]) -> str:
    """Images a second and MFU of ours, and what the other contenders make of it."""
    if not speed:
        return f"{letter} does not fit"
    first, *others = speed
    mfu = speed[first] * bench.about[first]["gflop_per_image"] / 1e3 / PEAK_TFLOPS
    beside = "".join(f", {bench.about[name]['contender']} x{speed[name] / speed[first]:.2f}" for name in others)
    return f"{letter} {speed[first]:.0f}/s, {mfu:.1%} MFU{beside}"


if __name__ == "__main__":
    main()
