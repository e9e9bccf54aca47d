"""Fetching from a web of which a part is dead: rows a second beside the same list without that part.

    python benchmarks/fetch_bad_web.py [--rows 12000] [--rounds 3] [--out FILE]

A server in a process of its own answers after 20 ms, under 200 addresses of this machine. In the bad list one host in a
hundred takes connections and never says a word, and one row in two hundred has a name whose name server is silent. Both
lists, of small pictures, are fetched alike, with time-outs of three seconds and two tries, in turns. The figure is the
ratio of rows a second (wall time, for waiting is what is measured); how many rows a second either makes depends on the
machine.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np
from aiohttp import web
from machine import machine

from data_pipeline.preparation import ImageRules, WebRules, fetch

HOSTS, SILENT, LATENCY = 200, 2, 0.02


def serve(picture: bytes, ready: Connection) -> None:
    async def answer(request: web.Request) -> web.Response:
        await asyncio.sleep(LATENCY)
        name = request.path.removeprefix("/")
        if not name.isdigit():
            return web.Response(status=404)
        return web.Response(body=picture, content_type="image/jpeg")

    async def run() -> None:
        application = web.Application()
        application.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "0.0.0.0", 0, backlog=4096)
        await site.start()
        ready.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


def urls(rows: int, port: int, silent_port: int, bad: bool) -> list[str]:
    found = []
    for row in range(rows):
        host = row % HOSTS
        if bad and row % 200 == 7:
            found.append(f"http://dead{row}.test/{row}")
        elif bad and host < SILENT:
            found.append(f"http://127.0.1.{1 + host}:{silent_port}/{row}")
        else:
            found.append(f"http://127.0.0.{1 + host}:{port}/{row}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    about = machine("aiohttp", "aiodns")
    picture = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))[1].tobytes()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(picture, sender), daemon=True)
    server.start()
    port = receiver.recv()
    mute, names = socket.create_server(("0.0.0.0", 0), backlog=4096), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind(("127.0.0.1", 0))
    rules = WebRules(
        private_networks=("127.0.0.0/8",), nameservers=(f"127.0.0.1:{names.getsockname()[1]}",),
        connect_timeout=3.0, read_timeout=3.0, attempts=2,
    )  # fmt: skip
    rates: dict[str, list[float]] = {"sound": [], "bad": []}
    rejected: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for turn in range(arguments.rounds):
            for side, seconds in rates.items():
                folder = Path(temporary) / f"{side}-{turn}"
                table = folder.with_suffix(".txt")
                table.write_text("\n".join(urls(arguments.rows, port, mute.getsockname()[1], side == "bad")))
                started = time.perf_counter()
                done = fetch(table, folder, rules=ImageRules(shorter_side=256), web=rules, workers=1)
                seconds.append(round(arguments.rows / (time.perf_counter() - started), 1))
                print(f"round {turn}  {side:6} {seconds[-1]:7.1f} rows/s  {dict(done.rejected)}", flush=True)
                if side == "bad":
                    rejected = dict(done.rejected)
                elif done.rejected:
                    raise SystemExit(f"the sound list lost rows: {done.rejected}")
    server.terminate()
    ratios = [bad / sound for bad, sound in zip(rates["bad"], rates["sound"], strict=True)]
    middle = statistics.median(ratios)
    print(f"bad / sound: {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of the rows a second")
    if arguments.out:
        result = {
            "machine": about, "rows": arguments.rows, "rejected": rejected, "rows_per_second": rates,
            "ratio": [round(value, 3) for value in (min(ratios), middle, max(ratios))],
        }  # fmt: skip
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
