"""Every shipped configuration starts and makes steps with the same code, cut down where a small machine needs it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
import yaml

from data_pipeline.preparation import pack
from pretrain.configuration import dump_config, load_config, parse_config
from pretrain.models import create_model
from pretrain.tasks.dense.section import DenseTask

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


@pytest.fixture(scope="module")
def dense_shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four small pictures with COCO's objects, and with label maps."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "dense"))
    from dense_sets import pack_shapes

    folder = tmp_path_factory.mktemp("dense")
    return {kind: pack_shapes(folder / kind, 4, label_maps=kind == "labels") for kind in ("objects", "labels")}


def narrow_heads(task: dict) -> dict:
    """The heads of a dense task, narrow."""
    small = {"width": 64, "hidden": 32, "heads": 2, "queries": 8, "encoder_layers": 1, "decoder_layers": 2}
    if "mask2former" in task:
        task["mask2former"] |= small | {"encoder_hidden": 32, "points": 64}
    task |= {key: value for key, value in small.items() if key in task}
    return task | ({"auxiliary_width": 8} if "auxiliary_width" in task else {})


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_makes_steps(
    name: str, shards: Path, dense_shards: dict[str, Path], tmp_path: Path
) -> None:
    from pretrain.training import run

    config = load_config(name)
    raw = config.model_dump(mode="json")
    if isinstance(config.task, DenseTask):
        shards = dense_shards[config.task.annotations]
        raw["task"] = narrow_heads(raw["task"])
        raw["data"]["rectangle"] = {**raw["data"]["rectangle"], "shorter": [64], "longer": 64}
    raw["data"]["sources"] = [{**raw["data"]["sources"][0], "path": str(shards)}]
    raw["data"] |= {"image_size": 64, "workers": 0, "context_length": 16}
    raw["model"]["overrides"] |= NARROW
    if raw["task"]["name"] == "pretraining":
        raw["task"]["text"] |= {"name": None, "width": 16, "layers": 1, "heads": 1}
        raw["task"]["decoder"] |= {"dim": 16, "layers": 1, "heads": 2}
    raw["training"] |= {"batch_size": 4, "accumulation": 1, "precision": "fp32"}
    raw["schedule"] |= {"steps": 2, "epochs": None, "warmup_steps": 1, "warmup_epochs": None}
    if config.model.name == "internimage_h":
        raw["model"]["overrides"] |= {"clip_embed_dim": 32, "clip_heads": 2, "level2_post_norm_block_ids": [1]}
        raw["model"]["overrides"] |= {"head_hidden_size": 16}
    if name == "internimage_h_m3i_427m":
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


def test_the_demos_dense_recipes_read_the_scenes_that_the_demo_composes() -> None:
    from pretrain.demo.dense import RECIPES

    for name, kind, _ in RECIPES.values():
        assert [source.path for source in load_config(name).data.sources] == [f"runs/demo/scenes/train/{kind}"]
