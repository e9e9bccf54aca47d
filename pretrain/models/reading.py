"""Weight files: .pth (never unpickled beyond tensors), .safetensors, sharded .safetensors by their index."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import UserError

INDEX_SUFFIX = ".safetensors.index.json"


def read_weights(path: str | Path) -> dict[str, Any]:
    """The entries of a weight file, on the CPU. A .pth that holds them under `model` or `state_dict` gives what is in
    there.

    path: a .safetensors, a .safetensors.index.json, a .pth/.pt/.bin, or a folder that holds one of these.
    Raises UserError naming the file where it is missing, damaged, or holds more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    try:
        if path.name.endswith(INDEX_SUFFIX):
            return _sharded(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch.load raises many kinds; each means that this file is not one
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable file of weights (tensors only are read): {reason}") from None
    for key in ("model", "state_dict", "model_ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    wrong = (
        [key for key, value in state.items() if not isinstance(value, Tensor)] if isinstance(state, dict) else ["(all)"]
    )
    if wrong:
        raise UserError(f"{path}: a mapping of names to tensors was expected; {wrong[0]!r} is none")
    return state


def _sharded(index: Path) -> dict[str, Tensor]:
    listing = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    state: dict[str, Tensor] = {}
    for name in sorted(set(listing.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise UserError(f"{index}: its shard {name!r} is missing")
        try:
            state.update(load_file(shard))
        except SafetensorError as error:
            raise UserError(f"{shard}: damaged: {error}") from None
    absent = sorted(set(listing) - set(state))
    if absent:
        raise UserError(f"{index}: lists {absent[0]!r}, which is in none of its shards")
    return state


def _in_folder(folder: Path) -> Path:
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.pth", "pytorch_model.bin"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{folder}: several weight files ({', '.join(f.name for f in found)}); name one")
    raise UserError(f"{folder}: holds no .safetensors, .pth or pytorch_model.bin")
