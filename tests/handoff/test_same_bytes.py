"""The same weights give the same files, however many ranks at whatever ZeRO stage saved them; H in bounded memory."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import run_config, write_checkpoint

from pretrain.configuration import dump_config, parse_config
from pretrain.handoff import export
from pretrain.tasks.task import module_of

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
SAVERS = [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2, 3)]  # of ZeRO
FLOAT = 4  # bytes


def digests(written: Path) -> dict[str, str]:
    files = [written] if written.is_file() else sorted(path for path in written.rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_whoever_saved_the_weights_their_exports_are_the_same_bytes(tmp_path: Path) -> None:
    """The last step of a schedule has lr 0: each saver loads one checkpoint and saves what it loaded."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
    from evaluation_shapes import write_set

    raw = run_config().model_dump(mode="json")
    raw["data"] |= {"sources": [{"path": str(write_set(tmp_path / "set"))}], "workers": 0}
    raw["schedule"] = {"steps": 2, "warmup_steps": 0}
    raw["training"] = {"batch_size": 12, "precision": "fp32", "stop_after": 1}
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(parse_config(raw)))
    assert yaml.safe_load(config.read_text())["schedule"]["steps"] == 2
    command = [sys.executable, str(Path(__file__).with_name("saving_ranks.py")), str(config), str(tmp_path)]
    command += [f"{stage}:{ranks}" for stage, ranks in SAVERS]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # which a copy of a process cannot share
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[dict[str, str]]] = {}
    for stage, ranks in SAVERS:
        run = tmp_path / f"zero-{stage}-ranks-{ranks}"
        state = json.loads((run / "checkpoints/step-00000002/state.json").read_text())
        assert (state["zero_stage"], state["world_size"]) == (stage, ranks)
        for layout in ("safetensors", "official", "timm", "hf", "open_clip"):
            name = {"safetensors": "m.safetensors", "official": "m.pth"}.get(layout, layout)
            written = export(run, layout, tmp_path / "exports" / f"{stage}-{ranks}" / name, which="model")
            found.setdefault(layout, []).append(digests(written))
    for layout, of_savers in found.items():
        assert all(files == of_savers[0] for files in of_savers), layout


MEASURED = """
import resource, sys, time
from pretrain.handoff import export
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.monotonic()
export(sys.argv[1], sys.argv[2], sys.argv[3])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.monotonic() - began, base * 1024, peak * 1024)
"""


@pytest.mark.parametrize(("layout", "name"), [("safetensors", "h.safetensors"), ("timm", "h")])
def test_h_is_exported_in_less_than_one_and_a_half_times_its_size(layout: str, name: str, tmp_path: Path) -> None:
    config = parse_config(
        {
            "model": {"name": "internimage_h", "num_classes": 1000},
            "task": {"name": "classification"},
            "data": {"sources": [{"path": "nowhere"}], "image_size": 640},
            "schedule": {"steps": 1},
        }
    )
    with torch.device("meta"):
        module = module_of(config, classes=1000)
    size = FLOAT * sum(value.numel() for value in module.parameters())
    write_checkpoint(tmp_path / "run", config, module.to_empty(device="cpu"))
    del module
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "run"), layout, str(tmp_path / name)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seconds, base, peak = (float(word) for word in done.stdout.split()[-3:])
    print(f"H, {layout}: {size / 1e9:.2f} GB of weights, peak {peak / 1e9:.2f} GB ({peak / size:.2f} times), of which")
    print(f"{base / 1e9:.2f} GB libraries; {seconds:.0f} s of {time.monotonic() - began:.0f} s with the start")
    assert peak < 1.5 * size
