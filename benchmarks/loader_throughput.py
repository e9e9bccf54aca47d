"""Images a second on one core: our reader, open_clip's loader, plain webdataset, the bare decoder, on the same shards.

    python benchmarks/loader_throughput.py [--set FOLDER] [--images 512] [--rounds 15] [--out FILE]

Every side reads JPEG shards, takes one random resized crop (area 0.9 to 1, open_clip's training transform) to 224 px,
tokenises captions with open_clip's tokenizer and ends in the same normalised float32 batch of 64, in one process on one
thread. The bare decoder has its bytes in memory and no captions. The sides take turns; figures are medians over the
rounds of images per second of CPU time (other processes on the machine then matter little), and also of wall time.
Pixels are compared with Pillow's, and workers as processes with workers as threads. Ends with 1 beyond the limits.
Without --set, shards are made from the CC12M sample beside the checkout, or else from drawn pictures.
"""

import argparse
import importlib
import importlib.util
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import open_clip
import torch
import webdataset
from machine import machine
from PIL import Image
from torchvision import transforms

from data_pipeline.hashing import uniforms
from data_pipeline.reading import DataConfig, ImageText, Reader, normalize
from data_pipeline.reading.decode.pixels import can_reduce, decode, read_header
from data_pipeline.reading.decode.views import UNIFORMS, on_reduced, random_crop, reduction, render

SIZE, BATCH = 224, 64
SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
LIMITS = {"open_clip": 2.5, "decode + resize alone": 0.85}
WHOLE, SCALED = "decoded whole", "decoded at 1/2, 1/4 or 1/8"
DISTANCES = {  # levels of 255
    WHOLE: {"mean": 0.1, "99.9 % of the worst image": 1.0},
    SCALED: {"mean": 2.0, "99.9 % of the worst image": 30.0},
}
CC12M = Path(__file__).resolve().parents[2] / "shared/data/cc12m-sample.tar"


def make_shards(folder: Path, images: int, shards: int = 4) -> str:
    """`images` samples in `shards` tars; returns what they were made from."""
    samples = []
    if CC12M.is_file():
        with tarfile.open(CC12M) as archive:
            found = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}  # type: ignore[union-attr]
        samples = [(data, found[name[:-3] + "txt"]) for name, data in found.items() if name.endswith(".jpg")]
    else:
        rng = np.random.default_rng(0)
        for number in range(32):
            small = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
            file = io.BytesIO()
            small.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
            samples.append((file.getvalue(), f"a drawn picture, number {number}".encode()))
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(shard, images, shards):
                image, text = samples[number % len(samples)]
                for extension, data in (("jpg", image), ("txt", text)):
                    info = tarfile.TarInfo(f"{number:08d}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return "the CC12M sample, repeated" if CC12M.is_file() else "drawn pictures, 640 x 480"


def ours(folder: Path, tokenizer: Callable) -> Callable[[int], int]:
    config = DataConfig(
        sources=[{"path": str(folder)}],
        image_size=SIZE,
        views=1,
        workers=0,
        augmentation={"scale": SCALE, "ratio": RATIO, "flip": 0.0},
    )
    reader = Reader(config, ImageText(tokenizer, config.context_length), batch_size=BATCH)
    stream = reader.batches(0)

    def run(batches: int) -> int:
        for batch in islice(stream, batches):
            floats = normalize(batch.views[:, 0], MEAN, STD, torch.float32)
            assert floats.shape == (BATCH, 3, SIZE, SIZE)
        return batches * BATCH

    return run


def of_open_clip(folder: Path, tokenizer: Callable, images: int) -> Callable[[int], int]:
    shards = len(list(folder.glob("*.tar")))
    arguments = SimpleNamespace(
        train_data=f"{folder}/{{00000..{shards - 1:05d}}}.tar",
        train_num_samples=images,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH,
        world_size=1,
        workers=0,
    )
    transform = open_clip.image_transform(SIZE, is_train=True, mean=MEAN, std=STD)
    absent = importlib.util.find_spec("pandas") is None
    if absent:  # open_clip's loader imports it, for CSV files alone
        sys.modules["pandas"] = types.ModuleType("pandas")
    loader = importlib.import_module("open_clip_train.data")
    if absent:
        del sys.modules["pandas"]
    # webdataset 1.0 ends each shard with a marker that open_clip 3.3 takes for a member; it never sees it here.
    group = loader.group_by_keys_nothrow
    loader.group_by_keys_nothrow = lambda files, **options: group((f for f in files if "fname" in f), **options)
    data = loader.get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)

    def run(batches: int) -> int:
        done = 0
        while done < batches * BATCH:
            for floats, _ in islice(data.dataloader, batches - done // BATCH):
                assert floats.shape == (BATCH, 3, SIZE, SIZE)
                done += BATCH
        return done

    return run


def plain_webdataset(folder: Path, tokenizer: Callable) -> Callable[[int], int]:
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE, RATIO, transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    shards = len(list(folder.glob("*.tar")))
    data = (
        webdataset.WebDataset(f"{folder}/{{00000..{shards - 1:05d}}}.tar", shardshuffle=shards)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: tokenizer(text)[0])
        .batched(BATCH, partial=False)
    )

    def run(batches: int) -> int:
        done = 0
        while done < batches:
            for floats, _ in islice(iter(data), batches - done):
                assert floats.shape == (BATCH, 3, SIZE, SIZE)
                done += 1
        return done * BATCH

    return run


def bare(folder: Path) -> Callable[[int], int]:
    """decode + crop + antialiased resize + normalise, of bytes in memory."""
    images = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            images += [archive.extractfile(m).read() for m in archive if m.name.endswith(".jpg")]  # type: ignore[union-attr]
    chances = uniforms(0, np.arange(len(images)), UNIFORMS).tolist()

    def run(batches: int) -> int:
        for start in range(batches):
            views = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)
            for row in range(BATCH):
                number = (start * BATCH + row) % len(images)
                data = images[number]
                header = read_header(data, 10**8)
                crop = random_crop(header.width, header.height, chances[number], SCALE, RATIO, 0.0)
                reduce = reduction([crop], SIZE) if can_reduce(header) else 1
                pixels = decode(data, header, reduce)
                render(pixels, on_reduced(crop, reduce, pixels) if reduce > 1 else crop, views[row])
            normalize(torch.from_numpy(views), MEAN, STD, torch.float32)
        return batches * BATCH

    return run


def distance(folder: Path, crops: int = 4) -> dict[str, dict[str, float]]:
    """Our view against Pillow's own decode, crop and antialiased bicubic resize, in levels of 255: the mean over all
    pixels, and of the worst image the 99.9 % quantile. `crops` of each image, area 0.2 to 1."""
    means: dict[str, list[float]] = {WHOLE: [], SCALED: []}
    quantiles: dict[str, list[float]] = {WHOLE: [], SCALED: []}
    with tarfile.open(min(folder.glob("*.tar"))) as archive:
        images = [archive.extractfile(m).read() for m in archive if m.name.endswith(".jpg")][:32]  # type: ignore[union-attr]
    for number in range(crops * len(images)):
        data = images[number // crops]
        header = read_header(data, 10**8)
        chances = uniforms(1, np.array([number]), UNIFORMS)[0].tolist()
        crop = random_crop(header.width, header.height, chances, (0.2, 1.0), RATIO, 0.0)
        reduce = reduction([crop], SIZE)
        pixels, view = decode(data, header, reduce), np.empty((SIZE, SIZE, 3), np.uint8)
        used = on_reduced(crop, reduce, pixels) if reduce > 1 else crop
        render(pixels, used, view)
        left, top = int(used.left * reduce), int(used.top * reduce)
        right, bottom = left + int(used.width * reduce), top + int(used.height * reduce)
        box = (left, top, min(right, header.width), min(bottom, header.height))
        # Cropped first: Pillow's resize(box=...) would look at the pixels around the crop, too.
        cropped = Image.open(io.BytesIO(data)).convert("RGB").crop(box)
        expected = np.asarray(cropped.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
        off = np.abs(view.astype(int) - expected)
        kind = SCALED if reduce > 1 else WHOLE
        means[kind].append(float(off.mean()))
        quantiles[kind].append(float(np.quantile(off, 0.999)))
    return {
        kind: {
            "mean": round(statistics.mean(means[kind]), 3),
            "99.9 % of the worst image": round(max(quantiles[kind]), 1),
            "crops": len(means[kind]),
        }
        for kind in means
        if means[kind]
    }


def threads_and_processes(folder: Path, tokenizer: Callable, batches: int, count: int) -> dict[str, float]:
    """Images per second of wall time of `count` worker processes, and of as many threads of one process, reading the
    same batches with captions. Nothing else runs: training would share its interpreter with the threads."""
    config = DataConfig(sources=[{"path": str(folder)}], image_size=SIZE, views=1, workers=count)
    with Reader(config, ImageText(tokenizer, config.context_length), batch_size=BATCH) as reader:
        stream = reader.batches(0)
        for _ in islice(stream, 2 * count):
            pass
        began = time.perf_counter()
        for _ in islice(stream, batches):
            pass
        processes = batches * BATCH / (time.perf_counter() - began)
        stream.close()
    alone = config.model_copy(update={"workers": 0})
    readers = [Reader(alone, ImageText(tokenizer, alone.context_length), batch_size=BATCH) for _ in range(count)]

    def work(number: int, steps: range) -> None:
        for step in steps:
            readers[number].at(np.arange(step * BATCH, (step + 1) * BATCH))

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count), [range(2)] * count))
        began = time.perf_counter()
        list(pool.map(work, range(count), [range(number, batches, count) for number in range(count)]))
        threads = batches * BATCH / (time.perf_counter() - began)
    for reader in readers:
        reader.close()
    return {"workers": count, "processes": round(processes, 1), "threads": round(threads, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader_throughput.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = machine("numpy", "pillow", "open_clip_torch", "webdataset", "torchvision")
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.set or Path(temporary)
        made = "given" if arguments.set else make_shards(folder, arguments.images)
        images = arguments.images
        sides = {
            "ours": ours(folder, tokenizer),
            "open_clip": of_open_clip(folder, tokenizer, images),
            "webdataset": plain_webdataset(folder, tokenizer),
            "decode + resize alone": bare(folder),
        }
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for round_ in range(arguments.rounds + 1):  # the first one warms up
            for name, run in sides.items():
                wall, cpu = time.perf_counter(), time.process_time()
                count = run(images // BATCH)
                if round_:
                    rates[name].append((count / (time.process_time() - cpu), count / (time.perf_counter() - wall)))
        off = distance(folder)
        cores = len(os.sched_getaffinity(0))
        parallel = threads_and_processes(folder, tokenizer, 4 * images // BATCH, cores)
    median = {
        name: [round(statistics.median(column), 1) for column in zip(*values, strict=True)]
        for name, values in rates.items()
    }
    ratios = {
        name: round(statistics.median(a[0] / b[0] for a, b in zip(rates["ours"], rates[name], strict=True)), 3)
        for name in sides
        if name != "ours"
    }
    result = {
        "ratios of CPU time, ours over": ratios,
        "limits": LIMITS,
        "images per second": {name: {"of CPU time": cpu, "of wall time": wall} for name, (cpu, wall) in median.items()},
        "levels off Pillow": off,
        "limits of levels": DISTANCES,
        "images per second of wall time, workers as processes and as threads": parallel,
        "shards": made,
        "rounds": arguments.rounds,
        "machine": about,
    }
    print(json.dumps(result, indent=1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    too_slow = any(ratios[name] < limit for name, limit in LIMITS.items())
    too_far = any(off[kind][what] > limit for kind in off for what, limit in DISTANCES[kind].items())
    sys.exit(too_slow or too_far)


if __name__ == "__main__":
    main()
