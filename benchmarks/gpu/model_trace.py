"""One training step of H and one of T under the profiler: the longest kernels, launches a step, how busy the GPU is.

    python benchmarks/gpu/model_trace.py H T

Rows: a summary a model with the time of each kind of kernels, then its ten longest kernels by total time, each with its
share of all kernels' time. The trace itself, trace_h.json.gz beside the results, opens in Perfetto (chrome://tracing).
`busy` is kernel time over the step's time without the profiler, which slows launches down; covered_ms counts kernels
that overlap once; on a CPU the operators stand in for kernels.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from kernel_kinds import kind, short
from model_step import ModelStep, device_here, internimage, synchronize
from needs import packages
from record import OUT, headline, record, small

STEP = "trace"
BATCH = {"H": 32, "T": 256}
LONGEST = 10
LARGEST_BYTES = 15 << 20  # of what may be kept
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
NAME_LENGTH = 160


def events_of(trace: Path) -> list[dict[str, Any]]:
    """The complete events of a Chrome trace: name, category, start and duration in microseconds."""
    found = json.loads(trace.read_text())["traceEvents"]
    return [event for event in found if event.get("ph") == "X" and "dur" in event]


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end)."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > until:
            total += end - max(start, until)
            until = end
    return total


def profiled(step: ModelStep, trace: Path) -> None:
    """One step under the profiler, into a Chrome trace."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if step.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        synchronize(step.device)
    profiler.export_chrome_trace(str(trace))


def plain_ms(step: ModelStep, repeats: int) -> float:
    """Median milliseconds of a step without the profiler."""
    spent = []
    for _ in range(repeats):
        synchronize(step.device)
        started = time.perf_counter()
        step()
        synchronize(step.device)
        spent.append(1e3 * (time.perf_counter() - started))
    return statistics.median(spent)


def summarize(letter: str, batch: int, step_ms: float, events: list[dict[str, Any]], cuda: bool) -> str:
    """Records a model's rows; the words for the table."""
    kernels = [event for event in events if event.get("cat") in (KERNELS if cuda else ("cpu_op",))]
    launches = sum(event.get("cat") == "cuda_runtime" and "aunch" in event["name"] for event in events)
    launches += sum(event.get("cat") == "cuda_driver" and "aunch" in event["name"] for event in events)
    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for event in kernels:
        total[event["name"]] += event["dur"] / 1e3
        count[event["name"]] += 1
    everything = sum(total.values())
    kinds: dict[str, float] = defaultdict(float)
    for name, spent in total.items():
        kinds[kind(name) if cuda else "operator"] += spent
    by_kind = sorted(kinds.items(), key=lambda item: -item[1])
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in kernels]
    row = {
        "model": letter,
        "batch": batch,
        "step_ms": round(step_ms, 2),
        "profiled_ms": round((max(e for _, e in spans) - min(s for s, _ in spans)) / 1e3, 2) if spans else None,
        "kernels": len(kernels),
        "launches": launches,
        "kernel_ms": round(everything, 2),
        "busy": round(everything / step_ms, 3) if cuda else None,
        "covered_ms": round(covered(spans) / 1e3, 2),
        "kernels_under_10_us": sum(event["dur"] < 10 for event in kernels),
        "ms_by_kind": {name: round(spent, 2) for name, spent in by_kind},
    }
    record(STEP, row)
    longest = sorted(total, key=lambda name: -total[name])[:LONGEST]
    for place, name in enumerate(longest, 1):
        share = total[name] / everything
        record(
            STEP,
            {
                "model": letter,
                "place": place,
                "kernel": name[:NAME_LENGTH],
                "short": short(name),
                "ms": round(total[name], 3),
                "calls": count[name],
                "share": round(share, 4),
            },
        )
    hottest = ", ".join(f"{name} {spent / everything:.0%}" for name, spent in by_kind[:LONGEST])
    busy = f"{len(kernels)} kernels, busy {row['busy']:.0%}" if cuda else f"no CUDA device, {len(kernels)} operators"
    return f"{letter}: {step_ms:.0f} ms, {busy}: {hottest}"


def keep(trace: Path, name: str) -> int | None:
    """Put a trace, gzipped, beside the results; its bytes, None where it is too large or there is no such place."""
    target = os.environ.get(OUT)
    if not target:
        return None
    packed = trace.with_suffix(".gz")
    with trace.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as sink:
        shutil.copyfileobj(source, sink)
    size = packed.stat().st_size
    if size > LARGEST_BYTES:
        return None
    shutil.copyfile(packed, Path(target).with_name(name))
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(BATCH))
    parser.add_argument("--small", action="store_true", help="tiny models: does it run?")
    options = parser.parse_args()
    device, tiny, words = device_here(), small(), []
    with packages(STEP), tempfile.TemporaryDirectory() as folder:
        for letter in options.models:
            batch = 2 if tiny else BATCH[letter]
            model = internimage(letter, device, tiny=tiny)
            step = ModelStep(model, batch, 64 if tiny else 224, device)
            for _ in range(1 if tiny else 3):
                step()
            step_ms = plain_ms(step, 1 if tiny else 5)
            trace = Path(folder) / f"trace_{letter.lower()}.json"
            profiled(step, trace)
            words.append(summarize(letter, batch, step_ms, events_of(trace), device.type == "cuda"))
            headline(STEP, "; ".join(words))
            if letter == options.models[0]:
                record(STEP, {"model": letter, "trace_bytes": keep(trace, f"{trace.name}.gz")})
            del model, step
            gc.collect()


if __name__ == "__main__":
    main()
