"""Memory over 10,000 steps of a reader with workers: parent and workers, every 100 steps.

    python benchmarks/loader_memory.py [--steps 10000] [--workers 1] [--batch 16] [--leak BYTES] [--out FILE]

The set is made on the spot: 40 shards of 100 small JPEGs with captions, so that blocks, sidecars and descriptors turn
over many times (40 epochs at a batch of 16). Three measures of each process: anonymous memory (what it has allocated;
the judged one, since libraries and batches shared with others do not move it), Pss (its part of what is shared added)
and Rss (the whole of what is shared). The batches' shared memory is in the last two. A leak on purpose, `--leak BYTES`
a step in parent and worker, shows that the measures see one.
"""

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from machine import machine
from PIL import Image

from data_pipeline.reading import DataConfig, ImageText, Reader

EVERY = 100
LIMIT = {"anonymous growth per 1000 steps, megabytes": 0.1}


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


MEASURES = ("Anonymous", "Pss", "Rss")


def megabytes(process: int) -> list[float]:
    """The MEASURES of a process."""
    with open(f"/proc/{process}/smaps_rollup") as file:
        found = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in list(file)[1:])}
    return [round(found[name] / 1024, 3) for name in MEASURES]


def descriptors(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


class Tokenizer:
    """Runs in the workers, once a batch."""

    def __init__(self, leak: int) -> None:
        self._leak = leak
        self._kept: list[bytes] = []

    def __call__(self, texts: list[str]) -> torch.Tensor:
        if self._leak:
            self._kept.append(os.urandom(self._leak))
        return torch.zeros(len(texts), 16, dtype=torch.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--leak", type=int, default=0, metavar="BYTES")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader_memory.json"))
    arguments = parser.parse_args()
    curve = []
    names = ["parent", *(f"worker {number}" for number in range(arguments.workers))]
    about = machine("numpy")
    with tempfile.TemporaryDirectory() as folder:
        make_set(Path(folder))
        config = DataConfig(
            sources=[{"path": folder}], image_size=32, context_length=16, workers=arguments.workers, block_shards=4
        )
        began = time.perf_counter()
        kept = []
        with Reader(config, ImageText(Tokenizer(arguments.leak), 16), batch_size=arguments.batch) as reader:
            for batch in reader.batches(0):
                if arguments.leak:
                    kept.append(os.urandom(arguments.leak))
                if batch.step % EVERY == 0:
                    workers = [worker.process.pid for worker in reader._pool._workers] if reader._pool else []
                    family = [os.getpid(), *workers]
                    sizes = [size for process in family for size in megabytes(process)]
                    curve.append([batch.step, *sizes, sum(map(descriptors, family))])
                if batch.step >= arguments.steps:
                    break
        seconds = time.perf_counter() - began
    steps, *memory, files = (np.array(column) for column in zip(*curve, strict=True))
    count = len(MEASURES)
    totals = {name: np.sum(memory[number::count], axis=0) for number, name in enumerate(MEASURES)}
    result = {
        "all processes, megabytes": {name: settled(steps, total) for name, total in totals.items()},
        "limit": LIMIT,
        "descriptors, least and most after a tenth": [
            int(files[len(files) // 10 :].min()),
            int(files[len(files) // 10 :].max()),
        ],
        "seconds": round(seconds, 1),
        "batch": arguments.batch,
        "columns": ["step", *(f"{name} {measure}" for name in names for measure in MEASURES), "descriptors"],
        "curve": curve,
        "machine": about,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "curve"}, indent=1))
    _, axes = plt.subplots(1, count, figsize=(5 * count, 3.5))
    for number, (name, part) in enumerate(zip(MEASURES, axes, strict=True)):
        for process, column in zip(names, memory[number::count], strict=True):
            part.plot(steps, column, label=process)
        part.set_ylim(bottom=0)
        part.set(xlabel="step", ylabel="megabytes", title=name)
        part.legend()
    plt.tight_layout()
    plt.savefig(arguments.out.with_suffix(".png"), dpi=110)
    growth = result["all processes, megabytes"]["Anonymous"]["growth per 1000 steps (least squares)"]
    sys.exit(growth > LIMIT["anonymous growth per 1000 steps, megabytes"])


def settled(steps: np.ndarray, total: np.ndarray) -> dict[str, float]:
    """From a tenth of the steps on."""
    steps, total = steps[len(total) // 10 :], total[len(total) // 10 :]
    return {
        "after a tenth of the steps": round(float(total[0]), 1),
        "at the end": round(float(total[-1]), 1),
        "most": round(float(total.max()), 1),
        "distinct values": len(np.unique(total)),
        "growth per 1000 steps (least squares)": round(float(np.polyfit(steps, total, 1)[0] * 1000), 4),
    }


if __name__ == "__main__":
    main()
