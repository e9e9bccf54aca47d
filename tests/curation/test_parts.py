"""Packing and fetching shared among tasks: the same bytes as one task makes, whoever dies."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from curation_sets import encoded, files, photo

from data_pipeline.errors import StoppedError, UserError
from data_pipeline.executors.units import Part
from data_pipeline.preparation import WebRules, fetch, pack, verify
from data_pipeline.preparation.packing.parts import finish_parts, in_parts
from launch.cli import run
from launch.task_array import shared_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(22):
        (folder / f"{n:02d}.jpg").write_bytes(encoded(photo(n)) if n != 9 else b"no image")
        (folder / f"{n:02d}.txt").write_text(f"picture number {n}")
    return folder


@pytest.fixture
def whole(images: Path, tmp_path: Path) -> dict[str, bytes]:
    pack(images, tmp_path / "whole/set", rows_per_shard=2, workers=1)
    return files(tmp_path / "whole/set")


def test_parts_are_joined_to_the_same_bytes(images: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "parts/set"
    for index in (2, 0):
        pack(images, output, rows_per_shard=2, workers=1, part=Part(index, 3))
    assert run(["shards", "finish", str(output)]) == 2, "one is missing"
    with pytest.raises(UserError, match="00002-of-00003"):
        finish_parts(output)
    pack(images, output, rows_per_shard=2, workers=1, part=Part(1, 3))
    done = finish_parts(output)
    assert (done.parts, done.shards, done.samples) == (3, 11, 21)
    assert files(output) == whole and verify(output).sound
    assert finish_parts(output).samples == 21, "once more changes nothing"
    pack(images, output, rows_per_shard=2, workers=1)


def test_another_number_of_parts_is_refused(images: Path, tmp_path: Path) -> None:
    one = functools.partial(pack, images, tmp_path / "set", rows_per_shard=2, workers=1)
    one(part=Part(0, 2))
    for again in (functools.partial(in_parts, tmp_path / "set", 4, one), functools.partial(one, part=Part(0, 4))):
        with pytest.raises(UserError, match="go on with --parts 2"):
            again()
    assert [path.name for path in (tmp_path / "set/.parts").iterdir()] == ["00001-of-00002"]
    assert in_parts(tmp_path / "set", 2, one) is not None


def test_options_that_parts_cannot_have_are_refused(images: Path, tmp_path: Path) -> None:
    words = ["shards", "pack", str(images), str(tmp_path / "set"), "--rows-per-shard", "2", "--workers", "1"]
    assert run([*words, "--parts", "2", "--retry", "image_*"]) == 2
    assert run([*words, "--parts", "2", "--part", "1/2"]) == 2
    assert run([*words, "--part", "1/2", "--least-packed", "0.5"]) == 2
    assert not (tmp_path / "set").exists()
    with pytest.raises(UserError, match="--retry by one task"):
        shared_command([*words, "--retry", "image_*"], 4)


def test_a_set_of_parts_that_lacks_rows_is_no_success(images: Path, tmp_path: Path) -> None:
    words = ["shards", "pack", str(images), str(tmp_path / "set"), "--rows-per-shard", "2", "--workers", "1"]
    assert run([*words, "--parts", "2", "--least-packed", "0.9"]) == 0, "21 of 22"
    assert run([*words, "--parts", "2", "--least-packed", "0.99"]) == 3
    assert run(["shards", "finish", str(tmp_path / "set"), "--least-packed", "0.99"]) == 3
    for image in images.glob("*.jpg"):
        image.write_bytes(b"no image")
    words[3] = str(tmp_path / "none")
    assert run([*words, "--parts", "2"]) == 3
    assert run(["shards", "finish", words[3]]) == 3


def test_parts_of_different_runs_are_not_joined(images: Path, tmp_path: Path) -> None:
    pack(images, tmp_path / "set", rows_per_shard=2, workers=1, part=Part(0, 2))
    (images / "22.jpg").write_bytes(encoded(photo(22)))
    pack(images, tmp_path / "set", rows_per_shard=2, workers=1, part=Part(1, 2))
    with pytest.raises(UserError, match="different input"):
        finish_parts(tmp_path / "set")


def start(images: Path, output: Path, parts: int) -> "subprocess.Popen[str]":
    words = ["--rows-per-shard", "2", "--workers", "1", "--parts", str(parts)]
    command = [sys.executable, "-m", "launch", "shards", "pack", str(images), str(output), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_tasks_share_parts_and_take_over_those_of_the_dead(
    images: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "parts/set"
    tasks = [start(images, output, 5) for _ in range(3)]
    while not list(output.glob(".parts/*/*.tar")) and all(task.poll() is None for task in tasks):
        time.sleep(0.01)
    tasks[0].send_signal(signal.SIGKILL)
    ends = [task.wait(200) for task in tasks]
    assert ends[1:] == [0, 0], [task.stderr.read() for task in tasks]
    assert start(images, output, 5).wait(200) == 0  # where the dead one held the last part
    assert files(output) == whole


def test_a_signal_ends_a_task_behind_its_shard(images: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "parts/set"
    task = start(images, output, 1)
    while not list(output.glob(".parts/*/*_stats.json")) and task.poll() is None:
        time.sleep(0.005)
    task.send_signal(signal.SIGUSR1)
    assert task.wait(200) in (75, 0), task.stderr.read()
    if task.returncode == 75:
        assert not (output / "manifest.json").exists()
    again = functools.partial(pack, images, output, rows_per_shard=2, workers=1)
    assert in_parts(output, 1, again) is not None
    assert files(output) == whole


def test_other_processes_can_make_parts(images: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """What Ray's workers get is what these processes get: the part's work, pickled."""
    output = tmp_path / "parts/set"
    made = in_parts(output, 3, functools.partial(pack, images, output, rows_per_shard=2, workers=1), at_a_time=2)
    assert made is not None and made.parts == 3 and files(output) == whole


@pytest.fixture
def site(site_of: Callable[[Path], str], images: Path) -> str:
    return site_of(images)


def test_fetching_in_parts_gives_the_same_bytes(site: str, tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("".join(f"{site}/{n:02d}.jpg\n" for n in range(24)))
    web = WebRules(private_networks=("127.0.0.0/8",), attempts=1)
    one = functools.partial(fetch, tmp_path / "urls.txt", web=web, rows_per_shard=3, workers=1)
    one(tmp_path / "whole/set")
    output = tmp_path / "parts/set"
    done = in_parts(output, 5, functools.partial(one, output))
    assert done is not None and (done.shards, done.samples) == (8, 21)
    assert files(output) == files(tmp_path / "whole/set")


def test_a_signal_behind_the_last_shard_still_ends_the_task(site: str, tmp_path: Path) -> None:
    """Where the shards under way were all that the part had, there is nothing left that fetching could stop."""
    (tmp_path / "urls.txt").write_text("".join(f"{site}/{n % 22:02d}.jpg\n" for n in range(24)))
    output = tmp_path / "set"

    def at_the_end(done: int, total: int) -> None:
        if done == total:
            os.kill(os.getpid(), signal.SIGUSR1)

    one = functools.partial(
        fetch, tmp_path / "urls.txt", output, web=WebRules(private_networks=("127.0.0.0/8",), attempts=1),
        rows_per_shard=3, workers=1,
    )  # fmt: skip
    with pytest.raises(StoppedError):
        in_parts(output, 4, functools.partial(one, progress=at_the_end))
    assert [path.parent.name for path in output.glob(".parts/*/manifest.json")] == ["00001-of-00004"]
    assert in_parts(output, 4, one) is not None
