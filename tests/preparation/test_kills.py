"""fetch and pack killed at twenty random instants each, and continued: the same bytes as without a kill."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.preparation import verify

KILLS = 20
PACK = """
import sys
from pathlib import Path
from data_pipeline.preparation import ImageRules, pack
if __name__ == "__main__":
    pack(sys.argv[1], Path(sys.argv[2]), rows_per_shard=9, rules=ImageRules(shorter_side=40), workers=int(sys.argv[3]))
"""
FETCH = """
import sys
from pathlib import Path
from data_pipeline.preparation import ImageRules, WebRules, fetch
if __name__ == "__main__":
    web = WebRules(private_networks=("127.0.0.1/32",), backoff=0.01, attempts=2)
    rules = ImageRules(shorter_side=20)
    fetch(sys.argv[1], Path(sys.argv[2]), web=web, rules=rules, rows_per_shard=9, workers=int(sys.argv[3]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def killed(code: str, source: Path, out: Path, at: random.Random, workers: int) -> int:
    """Runs until the work has begun, and a little longer; kills the process and all that it started; returns how many
    shards it left. The instants are drawn over the time that a whole run takes from there."""
    command = [sys.executable, "-c", code, str(source), str(out), str(workers)]
    process = subprocess.Popen(
        command, start_new_session=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    )
    before, deadline = state(out), time.monotonic() + 300
    while state(out) == before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(at.random() ** 2 * 0.3)  # near the beginning more often: later kills find less left to do
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=300)
    return len(list(out.glob("*_stats.json")))


def state(folder: Path) -> list[tuple[str, int]]:
    found = []
    for path in folder.glob("*") if folder.is_dir() else ():
        try:
            found.append((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:
            continue
    return sorted(found)


def go_on(code: str, source: Path, out: Path, workers: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        [sys.executable, "-c", code, str(source), str(out), str(workers)], env=environment, timeout=600, check=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_pack_killed_twenty_times_gives_the_same_bytes(
    workers: int, tmp_path: Path, picture: Callable, encode: Callable
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(700):
        (source / f"{number:03d}.png").write_bytes(encode(picture(number, (160, 120)), "PNG"))
        (source / f"{number:03d}.txt").write_text(f"picture {number}")
    (source / "050.png").write_bytes(b"no picture")
    go_on(PACK, source, tmp_path / "whole" / "set", workers)
    out, at, left = tmp_path / "killed" / "set", random.Random(workers), 0
    for _ in range(KILLS):
        now = killed(PACK, source, out, at, workers)
        assert now >= left
        left = now
    go_on(PACK, source, out, workers)
    assert contents(out) == contents(tmp_path / "whole" / "set") and verify(out, decode=True).sound


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_fetch_killed_twenty_times_gives_the_same_bytes(site, workers: int, tmp_path: Path) -> None:
    paths = [f"/status/404/{n}" if n % 10 == 3 else f"/html/{n}" if n % 10 == 7 else f"/ok/{n}" for n in range(700)]
    (tmp_path / "urls.csv").write_text(
        "url,caption\n" + "".join(f"{site.url(path)},{n}\n" for n, path in enumerate(paths))
    )
    source = tmp_path / "urls.csv"
    go_on(FETCH, source, tmp_path / "whole" / "set", workers)
    site.asked.clear()
    out, at, left = tmp_path / "killed" / "set", random.Random(workers), 0
    for _ in range(KILLS):
        now = killed(FETCH, source, out, at, workers)
        assert now >= left
        left = now
    go_on(FETCH, source, out, workers)
    assert contents(out) == contents(tmp_path / "whole" / "set") and verify(out, decode=True).sound
    again = sum(count - 1 for path, count in site.asked.items() if path != "/robots.txt")
    assert again <= KILLS * 64  # only what a kill caught on its way is asked for again
