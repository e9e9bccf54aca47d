"""Fetching a URL list into shards of 256 px pictures: ours beside img2dataset, from one server on this machine.

    python benchmarks/fetch_beside.py --img2dataset ENVIRONMENT/bin/img2dataset [--rows 2000] [--rounds 3] [--out FILE]

img2dataset has an environment of its own, since it asks for other versions than ours:

    python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install img2dataset==1.47.0

Both sides ask the same server on this machine, from two processes with 64 requests at a time, for pictures that they
shrink to a shorter side of 256 px, encode as JPEG of quality 95, hash with SHA-256 and write as WebDataset shards of
1,000 rows. They take turns. The figure is rows per CPU second of all processes of a side, start included, which other
work on the machine and the server's own work hardly touch; wall time stands beside it. Every row must arrive.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow
import pyarrow.parquet
from machine import machine

SIDE, QUALITY, PROCESSES, REQUESTS, ROWS_PER_SHARD = 256, 95, 2, 64, 1000
CC12M = Path(__file__).resolve().parents[2] / "shared/data/cc12m-sample.tar"


def pictures(size: tuple[int, int] = (800, 600)) -> tuple[list[bytes], str]:
    """JPEG files of different content, and what they are: the CC12M sample where it lies beside the checkout."""
    if CC12M.is_file():
        with tarfile.open(CC12M) as archive:
            members = [member for member in archive if member.name.endswith(".jpg")]
            return [archive.extractfile(member).read() for member in members], "the CC12M sample"  # type: ignore[union-attr]
    import cv2
    import numpy as np

    rng, files = np.random.default_rng(0), []
    for _ in range(32):
        drawn = cv2.resize(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), size, interpolation=cv2.INTER_CUBIC)
        files.append(cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
    return files, f"drawn pictures, {size[0]} x {size[1]}"


def serve(files: list[bytes], ready: Connection) -> None:
    class Pictures(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.removeprefix("/").removesuffix(".jpg")
            content = files[int(name) % len(files)] if name.isdigit() else b""
            self.send_response(200 if content else 404)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 1024

    server = Server(("127.0.0.1", 0), Pictures)
    ready.send(server.server_address[1])
    server.serve_forever()


def ours(table: Path, output: Path) -> list[str]:
    options = f"--shorter-side {SIDE} --quality {QUALITY} --rows-per-shard {ROWS_PER_SHARD} --workers {PROCESSES}"
    polite = f"--connections {REQUESTS} --per-host {REQUESTS} --private-network 127.0.0.0/8"
    return [sys.executable, "-m", "launch", "shards", "fetch", str(table), str(output), *f"{options} {polite}".split()]


def theirs(program: Path, table: Path, output: Path) -> list[str]:
    options = {
        "url_list": table,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": output,
        "processes_count": PROCESSES,
        "thread_count": REQUESTS // PROCESSES,
        "image_size": SIDE,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "encode_quality": QUALITY,
        "number_sample_per_shard": ROWS_PER_SHARD,
        "compute_hash": "sha256",
        "enable_wandb": False,
    }
    return [str(program), *(f"--{name}={value}" for name, value in options.items())]


def timed(command: list[str], log: Path) -> tuple[float, float]:
    """CPU and wall seconds of a command and all processes that it waits for. Raises SystemExit where it fails."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])} if "-m" in command else None
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("wb") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def images_in(folder: Path) -> int:
    count = 0
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as archive:
            count += sum(member.name.endswith(".jpg") for member in archive)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--img2dataset", type=Path, required=True, help="its program")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    about = machine("aiohttp")
    asked = "from importlib.metadata import version; print(version('img2dataset'))"
    python = [str(arguments.img2dataset.parent / "python"), "-c", asked]
    version = subprocess.run(python, capture_output=True, text=True, check=True).stdout.strip()
    files, source = pictures()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(files, sender), daemon=True)
    server.start()
    port = receiver.recv()
    rates: dict[str, dict[str, list[float]]] = {"ours": {"cpu": [], "wall": []}, "img2dataset": {"cpu": [], "wall": []}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table = folder / "urls.parquet"
        rows = range(arguments.rows)
        columns = {
            "url": [f"http://127.0.0.1:{port}/{row}.jpg" for row in rows],
            "caption": [f"picture {row}" for row in rows],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), table)
        for turn in range(arguments.rounds):
            for side, seconds in rates.items():
                output = folder / f"{side}-{turn}"
                command = ours(table, output) if side == "ours" else theirs(arguments.img2dataset, table, output)
                cpu, wall = timed(command, folder / "log")
                if (found := images_in(output)) != arguments.rows:
                    raise SystemExit(f"{side}: {found} of {arguments.rows} pictures arrived")
                seconds["cpu"].append(round(arguments.rows / cpu, 1))
                seconds["wall"].append(round(arguments.rows / wall, 1))
                print(f"round {turn}  {side:12} {seconds['cpu'][-1]:6.0f} rows a CPU second")
    server.terminate()
    ratios = [a / b for a, b in zip(rates["ours"]["cpu"], rates["img2dataset"]["cpu"], strict=True)]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"ours / img2dataset {version}: {middle:.2f} ({low:.2f} to {high:.2f}) rows a CPU second")
    if arguments.out:
        result = {
            "machine": about,
            "pictures": source,
            "rows": arguments.rows,
            "img2dataset": version,
            "rows_a_cpu_second": {side: seconds["cpu"] for side, seconds in rates.items()},
            "rows_a_second": {side: seconds["wall"] for side, seconds in rates.items()},
            "ratio": {"median": round(middle, 2), "range": [round(low, 2), round(high, 2)]},
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
