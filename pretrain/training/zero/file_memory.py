"""Tensors that lie in files on a local disk, for what is touched once a step: Adam's moments and the EMA.

The files are mapped, so the system keeps in memory as much of them as there is room for. They have no name once they
are mapped: nothing is left of them when the process ends, however it ends. They are no checkpoint.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import UserError


def zeros(shape: Sequence[int], like: Tensor, folder: Path | None) -> Tensor:
    """Zeros of `like`'s dtype: in a file under `folder`, or in memory beside `like` where it is None.

    Raises UserError where the folder cannot hold them, and where `like` is not in the host's memory.
    """
    count = math.prod(shape)
    if folder is None or count == 0:
        return torch.zeros(*shape, dtype=like.dtype, device=like.device)
    if like.device.type != "cpu":
        raise UserError(
            "training.offload_folder: the optimizer's weights are on a GPU; set training.offload_optimizer to true too"
        )
    size = count * like.element_size()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(prefix=".offload-", dir=folder)
        try:
            os.posix_fallocate(descriptor, 0, size)  # a full disk is told here, not by SIGBUS in a step
            flat = torch.from_file(path, shared=True, size=count, dtype=like.dtype)
        finally:
            os.close(descriptor)
            os.unlink(path)
    except OSError as error:
        raise UserError(
            f"training.offload_folder {folder}: {size} bytes cannot be laid there ({error.strerror or error}); "
            "make room, or name a folder on another disk"
        ) from None
    return flat.view(*shape)
