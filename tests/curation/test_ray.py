"""Units of work on a local Ray of two processes: the same bytes as without. Skipped where Ray is not installed."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from curation_sets import encoded, files, photo

from data_pipeline.curation.decisions import SetPath
from data_pipeline.curation.resharding import Running, reshard_set
from data_pipeline.preparation import WebRules, fetch, pack

ROOT = Path(__file__).resolve().parents[2]
HAS_RAY = importlib.util.find_spec("ray") is not None


def on_ray(*commands: list[str]) -> None:
    """Runs commands of the command line on a Ray of two processes."""
    code = f"""
import ray
environment = {{"env_vars": {{"PYTHONPATH": {os.pathsep.join([str(ROOT), *sys.path])!r}}}}}
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
from launch.cli import run
codes = [run(words) for words in {commands!r}]
ray.shutdown()
raise SystemExit(max(codes))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed (extra ray)")
def test_ray_makes_the_same_bytes(
    make_set: Callable[..., Path], site_of: Callable[[Path], str], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        (images / f"{number:02d}.jpg").write_bytes(encoded(photo(number)) if number != 9 else b"no image")
    pack(images, tmp_path / "a/packed", rows_per_shard=2, workers=1)
    urls = tmp_path / "urls.txt"
    urls.write_text("".join(f"{site_of(images)}/{n:02d}.jpg\n" for n in range(14)))
    local = WebRules(private_networks=("127.0.0.0/8",), attempts=1)
    fetch(urls, tmp_path / "a/fetched", web=local, rows_per_shard=3, workers=1)
    folder = make_set("web", [encoded(photo(n)) for n in range(24)])
    reshard_set(SetPath(folder), tmp_path / "a/new", samples_per_shard=3, shuffle=5, running=Running(workers=1))
    new, packed, fetched = (str(tmp_path / "b" / name) for name in ("new", "packed", "fetched"))
    web = ["--private-network", "127.0.0.0/8", "--attempts", "1", "--rows-per-shard", "3"]
    on_ray(
        ["shards", "reshard", str(folder), new, "--samples-per-shard", "3", "--shuffle", "5", "--executor", "ray"],
        ["shards", "pack", str(images), packed, "--rows-per-shard", "2", "--parts", "3", "--executor", "ray"],
        ["shards", "fetch", str(urls), fetched, *web, "--parts", "3", "--executor", "ray"],
    )
    assert files(tmp_path / "b") == files(tmp_path / "a")


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_extra_is_named(make_set: Callable[..., Path], tmp_path: Path, capsys) -> None:
    from launch.cli import run

    folder = make_set("web", [encoded(photo(0))])
    assert run(["shards", "reshard", str(folder), str(tmp_path / "new"), "--executor", "ray"]) == 2
    assert "internimage-pretrain[ray]" in capsys.readouterr().err
    assert run(["shards", "pack", str(tmp_path), str(tmp_path / "new"), "--executor", "ray"]) == 2
    assert "--parts" in capsys.readouterr().err
