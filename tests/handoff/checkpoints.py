"""A run that was never trained: a module in a checkpoint of one rank, by the checkpoint's own writers."""

import json
from pathlib import Path

import torch

from data_pipeline.durable import file_sha256
from data_pipeline.reading.storage.sources import SourceRecord
from pretrain import __version__
from pretrain.configuration import dump_config, parse_config
from pretrain.training.checkpoint import disk
from pretrain.training.checkpoint.rank_file import write_rank_file
from pretrain.training.checkpoint.trained_on import TrainedOn

CLASSES = ("ant", "bee", "cat", "dog", "eel")

ARGUMENTS = {
    "channels": 16,
    "depths": [1, 1, 2, 1],
    "groups": [1, 2, 4, 8],
    "drop_path_rate": 0.1,
    "clip_embed_dim": 64,
    "clip_heads": 4,
}


def run_config(preset: str = "m3i", **overrides):
    pretraining = {
        "preset": preset,
        "embed_dim": 32,
        "text": {"width": 32, "layers": 1, "heads": 2},
        "decoder": {"dim": 32, "layers": 1, "heads": 2},
    }
    return parse_config(
        {
            "model": {"name": "custom", "overrides": {**ARGUMENTS, **overrides}},
            "task": {"name": "classification"} if preset == "supervised" else pretraining,
            "data": {"sources": [{"path": "nowhere"}], "image_size": 64, "mean": [0.5, 0.4, 0.3]},
            "schedule": {"steps": 1},
        }
    )


def write_checkpoint(run: Path, config, module: torch.nn.Module, step: int = 1000) -> Path:
    """`module` as the checkpoint of one rank, without an EMA."""
    folder, file = run / disk.FOLDER / disk.step_name(step), "rank-00000.safetensors"
    folder.mkdir(parents=True)
    kept, parameters = module.state_dict(), dict(module.named_parameters())
    buffers = {name: value for name, value in module.named_buffers() if name in kept}
    entries = [(f"param/{name}", value.detach().flatten()) for name, value in parameters.items()]
    write_rank_file(folder / file, entries + [(f"buffer/{name}", value) for name, value in buffers.items()])
    source = SourceRecord("animals", "nowhere", 160, 1.0, "0" * 64, {"license": "CC-BY-4.0"})
    index = {
        "parameters": {
            name: {"shape": list(value.shape), "ema": False, "fragments": [[file, 0, value.numel()]]}
            for name, value in parameters.items()
        },
        "buffers": dict.fromkeys(buffers, file),
    }
    state = {"step": step, "data": TrainedOn(160, "f", CLASSES, (source,)).as_json()}
    (folder / disk.INDEX).write_text(json.dumps(index))
    (folder / disk.STATE).write_text(json.dumps(state))
    (folder / disk.CONFIG).write_text(dump_config(config))
    files = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in folder.iterdir()}
    manifest = {"schema": disk.SCHEMA, "version": __version__, "step": step, "files": files}
    (folder / disk.MANIFEST).write_text(disk.sealed(manifest))
    return folder
