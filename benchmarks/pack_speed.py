"""Packing local pictures on one core: ours beside Pillow alone, and beside a plain ustar writer.

    python benchmarks/pack_speed.py [--pictures 640] [--rounds 5] [--out FILE]

resize         `pack` to a shorter side of 256 px, JPEG of quality 95, with shards, sidecars and digests, beside Pillow
               that opens, resizes (bicubic) and saves the same files and writes nothing
pass-through   `pack` that keeps the bytes, beside a loop that reads the same files and writes them into a ustar archive
               with headers of our own encoder: no decoding, no digests, no sidecar, no JSON; and beside the same loop
               with the two digests that a set promises, the picture's and the archive's

The sides take turns in one process on one core; the figure is pictures a CPU second. `pack` reads every JPEG marker by
marker to know that it can be decoded, and hashes it and its archive. The second writer is the bound that these digests
set to any pass-through.
"""

import argparse
import hashlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
from fetch_beside import pictures
from machine import machine
from PIL import Image

from data_pipeline.format import ustar
from data_pipeline.preparation import ImageRules, pack

SIDE, QUALITY = 256, 95


def with_pillow(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            ratio = SIDE / min(image.size)
            size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(io.BytesIO(), "JPEG", quality=QUALITY)


def with_plain_writer(folder: Path, output: Path, digests: bool = False) -> None:
    whole = hashlib.sha256()
    with open(output, "wb") as file:
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            for piece in (ustar.encode_header(path.name, len(data)), data, ustar.padding(len(data))):
                file.write(piece)
                if digests:
                    whole.update(piece)
            if digests:
                hashlib.sha256(data).hexdigest()
        file.write(ustar.END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    about = machine("simplejpeg", "opencv-python-headless", "pillow")
    files, source = pictures()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        folder.mkdir()
        for number in range(arguments.pictures):
            (folder / f"{number:06d}.jpg").write_bytes(files[number % len(files)])
        turns = iter(range(10**6))

        def packed(rules: ImageRules) -> None:
            pack(folder, Path(temporary) / f"set-{next(turns)}", rules=rules, workers=1)

        sides: dict[str, Callable[[], None]] = {
            "resize, ours": lambda: packed(ImageRules(shorter_side=SIDE, quality=QUALITY)),
            "resize, Pillow alone": lambda: with_pillow(folder),
            "pass-through, ours": lambda: packed(ImageRules()),
            "pass-through, plain writer": lambda: with_plain_writer(folder, Path(temporary) / f"{next(turns)}.tar"),
            "pass-through, hashing writer": lambda: with_plain_writer(
                folder, Path(temporary) / f"{next(turns)}.tar", digests=True
            ),
        }
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side, work in sides.items():
                started = time.process_time()
                work()
                rates[side].append(round(arguments.pictures / (time.process_time() - started), 1))
    for side, found in rates.items():
        print(f"{side:28} {statistics.median(found):9.1f} pictures a CPU second ({min(found)} to {max(found)})")
    ratios = {}
    for what, other in (
        ("resize", "Pillow alone"),
        ("pass-through", "plain writer"),
        ("pass-through", "hashing writer"),
    ):
        pairs = zip(rates[f"{what}, ours"], rates[f"{what}, {other}"], strict=True)
        each = sorted(ours / theirs for ours, theirs in pairs)
        ratios[f"{what} / {other}"] = [round(value, 3) for value in (each[0], statistics.median(each), each[-1])]
        print(f"{what}: ours / {other} {ratios[f'{what} / {other}'][1]} ({each[0]:.3f} to {each[-1]:.3f})")
    if arguments.out:
        result = {"machine": about, "pictures": source, "count": arguments.pictures, "rates": rates, "ratios": ratios}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
