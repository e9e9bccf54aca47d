"""One rank's part of a checkpoint: a safetensors file written as a stream, hashed on the way, flushed to the disk.

The library's own writer wants all tensors at once and returns no digest; the format (8 bytes of header length, a JSON
header, the values) is simple enough to write piece by piece, so that a save needs no second copy of what it saves.
Reading is the library's.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
BLOCK = 1 << 24


def header(entries: Iterable[tuple[str, Tensor]]) -> bytes:
    described: dict[str, Any] = {}
    offset = 0
    for key, tensor in entries:
        size = tensor.numel() * tensor.element_size()
        described[key] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_rank_file(path: Path, entries: list[tuple[str, Tensor]]) -> dict[str, Any]:
    """Write, fsync; returns {"bytes", "sha256"}. Raises OSError where the disk does."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for block in _blocks(entries):
            digest.update(block)
            size += len(block)
            view = memoryview(block)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _blocks(entries: list[tuple[str, Tensor]]) -> Iterable[memoryview | bytes]:
    """Small tensors are joined, so that a thousand norms are not a thousand writes; large ones go out as they lie."""
    pending: list[bytes] = [header(entries)]
    waiting = len(pending[0])
    for _, tensor in entries:
        if tensor.numel() == 0:
            continue
        view = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        if len(view) < BLOCK // 16:
            pending.append(bytes(view))
            waiting += len(view)
        if waiting >= BLOCK or len(view) >= BLOCK // 16:
            yield b"".join(pending)
            pending, waiting = [], 0
        if len(view) >= BLOCK // 16:
            for start in range(0, len(view), BLOCK):
                yield view[start : start + BLOCK]
    if pending:
        yield b"".join(pending)
