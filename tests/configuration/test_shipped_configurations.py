"""Every shipped configuration starts and makes steps with the same code, cut down where a small machine needs it."""

import json
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
import yaml

from data_pipeline.preparation import pack
from pretrain.configuration import dump_config, load_config, parse_config
from pretrain.models import create_model

SHIPPED = sorted(p.stem for p in (Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
NARROW = {"channels": 16, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight drawings of noise in two classes, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(8):
        where = folder / f"class{i % 2}"
        where.mkdir(exist_ok=True)
        picture = rng.integers(0, 256, (80, 72, 3), dtype=np.uint8)
        (where / f"{i}.jpg").write_bytes(simplejpeg.encode_jpeg(picture))
        (where / f"{i}.txt").write_text(f"picture number {i}")
    out = tmp_path_factory.mktemp("sets") / "set"
    pack(folder, out, labels="folders")
    return out


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_makes_steps(name: str, shards: Path, tmp_path: Path) -> None:
    from pretrain.training import run

    raw = load_config(name).model_dump(mode="json")
    raw["data"]["sources"] = [{**raw["data"]["sources"][0], "path": str(shards)}]
    raw["data"] |= {"image_size": 64, "workers": 0, "context_length": 16}
    raw["model"]["overrides"] |= NARROW
    if raw["task"]["name"] == "pretraining":
        raw["task"]["text"] |= {"name": None, "width": 16, "layers": 1, "heads": 1}
        raw["task"]["decoder"] |= {"dim": 16, "layers": 1, "heads": 2}
    raw["training"] |= {"batch_size": 4, "accumulation": 1, "precision": "fp32"}
    raw["schedule"] |= {"steps": 2, "epochs": None, "warmup_steps": 1, "warmup_epochs": None}
    if name == "internimage_h_m3i_427m":
        raw["model"]["overrides"] |= {"clip_embed_dim": 32, "clip_heads": 2, "level2_post_norm_block_ids": [1]}
        raw["task"]["embed_dim"] = 16
    assert run(parse_config(raw, source=name), tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert np.isfinite(rows[-1]["loss"])


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_builds_its_whole_model_without_memory(name: str) -> None:
    model = load_config(name).model
    with torch.device("meta"):
        built = create_model(model.name, num_classes=model.num_classes, **model.overrides)
    assert all(parameter.is_meta for parameter in built.parameters())
    if name == "internimage_h_m3i_427m":
        assert sum(p.numel() for p in built.parameters()) > 1.0e9


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_resolves_to_what_it_says(name: str) -> None:
    config = load_config(name)
    assert parse_config(yaml.safe_load(dump_config(config))) == config
