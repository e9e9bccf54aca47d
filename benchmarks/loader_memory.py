"""Memory over 10,000 steps of a reader with workers: parent and workers, every 100 steps.

    python benchmarks/loader_memory.py [--steps 10000] [--workers 1] [--batch 16] [--out FILE]

The set is made on the spot: 40 shards of 100 small JPEGs with captions, so that blocks, sidecars and descriptors turn
over many times (40 epochs at a batch of 16). Memory is the anonymous part of each process: libraries shared
with other processes, whose share changes as those come and go, stay out.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from data_pipeline.reading import DataConfig, Reader

EVERY = 100


def make_set(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for shard in range(40):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(100):
                small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
                file = io.BytesIO()
                small.resize((48, 48), Image.Resampling.BICUBIC).save(file, "JPEG")
                for extension, data in (("jpg", file.getvalue()), ("txt", f"picture {shard} {number}".encode())):
                    info = tarfile.TarInfo(f"{shard:05d}{number:04d}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def megabytes(process: int) -> float:
    with open(f"/proc/{process}/smaps_rollup") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("Anonymous:"))


def descriptors(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.zeros(len(texts), 16, dtype=torch.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader_memory.json"))
    arguments = parser.parse_args()
    curve = []
    with tempfile.TemporaryDirectory() as folder:
        make_set(Path(folder))
        config = DataConfig(
            sources=[{"path": folder}], image_size=32, context_length=16, workers=arguments.workers, block_shards=4
        )
        began = time.perf_counter()
        with Reader(config, tokenizer=tokenize, batch_size=arguments.batch) as reader:
            for batch in reader.batches(0):
                if batch.step % EVERY == 0:
                    workers = [worker.process.pid for worker in reader._pool._workers] if reader._pool else []
                    family = [os.getpid(), *workers]
                    curve.append([batch.step, *(round(megabytes(p), 2) for p in family), sum(map(descriptors, family))])
                if batch.step >= arguments.steps:
                    break
        seconds = time.perf_counter() - began
    steps, *memory, files = (np.array(column) for column in zip(*curve, strict=True))
    total = np.sum(memory, axis=0)
    settled = total[len(total) // 10 :]
    result = {
        "megabytes after a tenth of the steps": round(float(settled[0]), 1),
        "megabytes at the end": round(float(settled[-1]), 1),
        "most": round(float(settled.max()), 1),
        "growth per 1000 steps, megabytes (least squares)": round(
            float(np.polyfit(steps[-len(settled) :], settled, 1)[0] * 1000), 4
        ),
        "descriptors, least and most after a tenth": [
            int(files[len(files) // 10 :].min()),
            int(files[len(files) // 10 :].max()),
        ],
        "seconds": round(seconds, 1),
        "batch": arguments.batch,
        "columns": ["step", "parent", *(f"worker {n}" for n in range(arguments.workers)), "descriptors"],
        "curve": curve,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "curve"}, indent=1))
    plt.figure(figsize=(7, 3.5))
    for name, column in zip(result["columns"][1:], memory, strict=False):
        plt.plot(steps, column, label=name)
    plt.ylim(bottom=0)
    plt.xlabel("step")
    plt.ylabel("anonymous memory, megabytes")
    plt.legend()
    plt.tight_layout()
    plt.savefig(arguments.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
