"""The order of a large run: start, seek and memory on 427 million samples in 42,700 shards; how well blocks shuffle.

    python benchmarks/loader_order.py [--out benchmarks/results/loader_order.json]

Start and seek go from the manifest of such a set to the names of a batch's samples, sidecars read; seconds are of CPU
time, from a warm page cache. Ends with 1 where they are above a second, or memory above 200 MB.
Writes the JSON and, beside it, a figure: the distance in the set between neighbours of the order, and the entropy of
the labels in a batch, for growing blocks and for a full shuffle; the entropy of the sources in a batch of a mixture.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
from machine import machine
from matplotlib.axes import Axes

from data_pipeline.format import ShardEntry, write_manifest, write_sidecar
from data_pipeline.format.sidecar import table
from data_pipeline.reading import DataConfig, ImageText, Reader
from data_pipeline.reading.order.mixture import Mixture
from data_pipeline.reading.order.samples import SourceOrder

SHARDS, SAMPLES, BATCH = 42_700, 10_000, 4096
BLOCKS = (1, 4, 16, 64)
LIMITS = {"seconds": 1.0, "megabytes": 200.0}
MIXTURE = {"laion": 400, "yfcc": 15, "cc12m": 10, "in22k": 14}  # weights, in millions of samples


def write_large_set(folder: Path) -> None:
    """The manifest of 427 million samples. Its shards are one sparse file and one real sidecar under 42,700 names."""
    rows = [
        {
            "row": number,
            "status": "packed",
            "reason": "",
            "key": f"{number:09d}",
            "url": f"https://pictures.invalid/{number}",
            "sha256": hashlib.sha256(str(number).encode()).hexdigest(),
            "caption": f"a caption of some sixty letters, as they are on the web, {number}",
            "image_offset": 35_000 * number + 512,
            "image_size": 34_000,
            "image_format": "jpeg",
        }
        for number in range(SAMPLES)
    ]
    write_sidecar(folder / "one.parquet", table(rows))
    with open(folder / "one.tar", "wb") as file:
        file.truncate(35_000 * SAMPLES)
    entries = []
    for number in range(SHARDS):
        names = [f"{number:05d}.{kind}" for kind in ("tar", "parquet")]
        for name in names:
            os.link(folder / f"one{Path(name).suffix}", folder / name)
        digest = hashlib.sha256(names[0].encode()).hexdigest()
        entries.append(ShardEntry(*names, SAMPLES, 35_000 * SAMPLES, digest))
    write_manifest(folder, name="large", shards=entries)


def memory(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(f"{field}:"))


def seeking(folder: Path) -> dict[str, float]:
    """In a process of its own: CPU seconds from the configuration to the names of the samples of the first batch, with
    their sidecars read, and the same to batches far away; megabytes at the most above what the libraries take."""
    config = DataConfig(sources=[{"path": str(folder)}], image_size=64, context_length=16, workers=0, block_shards=16)
    table([])  # loads libraries
    with pq.ParquetFile(folder / "one.parquet") as file:
        file.read()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began = time.process_time()
    reader = Reader(config, ImageText(), batch_size=BATCH)
    manifest_read = time.process_time() - began
    assert len(reader.lineage(0)) == BATCH
    start = time.process_time() - began
    seeks, located = [], []
    for step in np.random.default_rng(0).integers(0, 30 * SHARDS * SAMPLES // BATCH, 20):
        began = time.process_time()
        reader.order.locate(np.arange(step * BATCH, (step + 1) * BATCH))
        located.append(time.process_time() - began)
        reader.lineage(int(step))
        seeks.append(time.process_time() - began)
    following = []
    for step in range(10**6, 10**6 + 20):
        began = time.process_time()
        reader.order.locate(np.arange(step * BATCH, (step + 1) * BATCH))
        following.append(time.process_time() - began)
    return {
        "start_seconds": round(start, 4),
        "start_seconds_of_which_manifest": round(manifest_read, 4),
        "seek_seconds_median": round(float(np.median(seeks)), 4),
        "seek_seconds_worst": round(max(seeks), 4),
        "seek_seconds_of_which_order": round(float(np.median(located)), 4),
        "order_of_the_next_batch_seconds": round(float(np.median(following)), 6),
        "memory_megabytes": round(memory("VmHWM") - before, 1),
    }


def in_a_process_of_its_own(folder: Path) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(seeking, (folder,))


def entropy(values: np.ndarray) -> float:
    """Bits of the distribution of `values`."""
    share = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(share * np.log2(share)).sum())


def shuffle_quality(
    figure: Path, shards: int = 256, samples: int = 1000, batch: int = 1024
) -> dict[str, dict[str, Any]]:
    """A set whose labels are sorted (64 classes, one after the other): what each block size makes of it."""
    total = shards * samples
    sequences = {"full shuffle": np.random.default_rng(0).permutation(total)}
    for block in BLOCKS:
        _, shard, row = SourceOrder([samples] * shards, block_shards=block, seed=0).locate(np.arange(total))
        sequences[f"block of {block}"] = shard * samples + row
    _, (left, right, third) = plt.subplots(1, 3, figsize=(16, 4))
    found: dict[str, dict[str, Any]] = {}
    for name, sequence in sequences.items():
        distance = np.abs(np.diff(sequence)) / total
        batches = sequence[: total // batch * batch].reshape(-1, batch)
        of_shards = [entropy(part // samples) for part in batches]
        of_labels = [entropy(part * 64 // total) for part in batches]
        found[name] = {
            "median distance of neighbours, share of the set": round(float(np.median(distance)), 4),
            "shard entropy of a batch, bits": round(float(np.mean(of_shards)), 2),
            "label entropy of a batch, bits (sorted labels)": round(float(np.mean(of_labels)), 2),
        }
        left.plot(np.sort(distance), np.linspace(0, 1, len(distance)), label=name)
        right.plot(of_labels, label=name, linewidth=0.8)
    left.set(
        xlabel="distance of neighbours, share of the set", ylabel="share of neighbours", title="Neighbours in the order"
    )
    right.set(xlabel="batch of 1024", ylabel="bits (most: 6)", title="Label entropy of a batch, labels sorted by shard")
    found |= mixture_quality(third, batch)
    for axes in (left, right, third):
        axes.legend(loc="lower right")
    plt.tight_layout()
    plt.savefig(figure, dpi=110)
    return found


def mixture_quality(axes: Axes, batch: int, batches: int = 400) -> dict[str, dict[str, Any]]:
    """Sources in the batches of a mixture, against independent draws by the same weights."""
    weights = np.array(list(MIXTURE.values()), dtype=float)
    positions = np.arange(batches * batch, dtype=np.int64)
    sequences = {
        "mixture": Mixture(list(weights), seed=0).locate(positions)[0],
        "independent draws": np.random.default_rng(0).choice(len(weights), len(positions), p=weights / weights.sum()),
    }
    found = {}
    for name, sequence in sequences.items():
        of_sources = [entropy(part) for part in sequence.reshape(-1, batch)]
        smallest = (sequence.reshape(-1, batch) == int(weights.argmin())).sum(1)
        found[f"{name} of {', '.join(f'{source} {weight}' for source, weight in MIXTURE.items())}"] = {
            "source entropy of a batch, bits, mean": round(float(np.mean(of_sources)), 3),
            "source entropy of a batch, bits, least": round(float(np.min(of_sources)), 3),
            "samples of the smallest source in a batch, least and most": [int(smallest.min()), int(smallest.max())],
        }
        axes.plot(of_sources, label=name, linewidth=0.8)
    axes.set(xlabel=f"batch of {batch}", ylabel="bits", title="Source entropy of a batch of a mixture")
    axes.set_ylim(bottom=0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader_order.json"))
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    about = machine("numpy")
    with tempfile.TemporaryDirectory() as folder:
        write_large_set(Path(folder))
        large = in_a_process_of_its_own(Path(folder))
    result = {
        "427 million samples in 42,700 shards": large,
        "limits": LIMITS,
        "shuffle of 256,000 samples in 256 shards": shuffle_quality(out.with_suffix(".png")),
        "machine": about,
    }
    print(json.dumps(result, indent=1))
    out.write_text(json.dumps(result, indent=1) + "\n")
    slowest = max(large["start_seconds"], large["seek_seconds_worst"])
    sys.exit(slowest > LIMITS["seconds"] or large["memory_megabytes"] > LIMITS["megabytes"])


if __name__ == "__main__":
    main()
