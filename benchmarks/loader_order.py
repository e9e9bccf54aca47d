"""The order of a large run: start, seek and memory on 427 million samples in 42,700 shards; how well blocks shuffle.

    python benchmarks/loader_order.py [--out benchmarks/results/loader_order.json]

Writes the JSON and, beside it, a figure: the distance in the set between neighbours of the order, and the entropy of
the shards in a batch, for growing blocks and for a full shuffle.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from data_pipeline.reading.order import Order, SourceOrder

SHARDS, SAMPLES = 42_700, 10_000
BLOCKS = (1, 4, 16, 64)


def seeking() -> dict[str, float]:
    """CPU seconds from nothing to a located batch of 4096, then to others far away; megabytes the process grew by."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    order = Order([np.full(SHARDS, SAMPLES)], [1.0], block_shards=16, seed=0)
    order.locate(np.arange(4096))
    start = time.process_time() - began
    seeks = []
    rng = np.random.default_rng(0)
    for position in rng.integers(0, 30 * SHARDS * SAMPLES, 20):
        began = time.process_time()
        order.locate(np.arange(position, position + 4096))
        seeks.append(time.process_time() - began)
    began = time.process_time()
    for step in range(20):
        order.locate(np.arange(10**9 + step * 4096, 10**9 + (step + 1) * 4096))
    return {
        "start_seconds": round(start, 4),
        "seek_seconds_median": round(float(np.median(seeks)), 4),
        "seek_seconds_worst": round(max(seeks), 4),
        "next_batch_seconds": round((time.process_time() - began) / 20, 5),
        "memory_megabytes": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1),
    }


def entropy(values: np.ndarray) -> float:
    """Bits of the distribution of `values`."""
    share = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(share * np.log2(share)).sum())


def shuffle_quality(
    figure: Path, shards: int = 256, samples: int = 1000, batch: int = 1024
) -> dict[str, dict[str, float]]:
    """A set whose labels are sorted (64 classes, one after the other): what each block size makes of it."""
    total = shards * samples
    sequences = {"full shuffle": np.random.default_rng(0).permutation(total)}
    for block in BLOCKS:
        _, shard, row = SourceOrder([samples] * shards, block_shards=block, seed=0).locate(np.arange(total))
        sequences[f"block of {block}"] = shard * samples + row
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    found = {}
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
    left.legend(loc="lower right")
    right.legend(loc="lower right")
    plt.tight_layout()
    plt.savefig(figure, dpi=110)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader_order.json"))
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "427 million samples in 42,700 shards": seeking(),
        "shuffle of 256,000 samples in 256 shards": shuffle_quality(out.with_suffix(".png")),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    print(json.dumps(result, indent=1))
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
