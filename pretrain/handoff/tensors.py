"""Writing files of weights: whole or not at all, for whom the umask allows, the same bytes for the same weights."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.durable import atomic_path, write_durably


def write_tensors(path: Path, state: Mapping[str, Tensor], key: str, value: str) -> Path:
    """A .safetensors file. A tensor that is no copy of its own is copied, one after the other is not.

    key, value: the only entry of its metadata, since the library writes several in another order each time.
    """
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata={key: value})
        as_umask_says(temporary)
    return path


def write_pickled(path: Path, content: Mapping[str, Any]) -> Path:
    """A .pth file, of plain containers and tensors. A tensor that is a part of a larger one is copied."""

    def own(value: Any) -> Any:
        if isinstance(value, Tensor):
            whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
            return value if whole else value.clone()
        return {key: own(inner) for key, inner in value.items()} if isinstance(value, dict) else value

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(own(dict(content)), file)  # by a file, for by a path its name would be in the bytes
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    write_durably(path, json.dumps(content, indent=2) + "\n")
    return path


def as_umask_says(path: Path) -> None:
    """Ordinary permissions, where a library made the file for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
