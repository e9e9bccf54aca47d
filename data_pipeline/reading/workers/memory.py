"""Shares memory between a process and its workers without names: no name can collide or be left behind, and /dev/shm,
whose size containers limit, is not used. Works with forked and spawned workers."""

import mmap
import os
import tempfile
from collections.abc import Mapping
from multiprocessing import reduction
from typing import Any

import numpy as np

Layout = dict[str, tuple[tuple[int, ...], type[np.generic]]]  # array name -> shape, element type
Arrays = Mapping[str, np.ndarray]
_ALIGN = 64


class SharedMemory:
    """`size` bytes behind a file descriptor that is handed to workers when they start."""

    def __init__(self, size: int) -> None:
        self.size = size
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("internimage-batches", os.MFD_CLOEXEC)
        else:  # not Linux
            with tempfile.TemporaryFile() as file:
                self._file = os.dup(file.fileno())
        os.ftruncate(self._file, size)
        self.map = mmap.mmap(self._file, size)

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "file": reduction.DupFd(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.size = state["size"]
        self._file = state["file"].detach()
        self.map = mmap.mmap(self._file, self.size)

    def close(self) -> None:
        """Closes the descriptor; the memory lives on while an array lies in it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def allocate(layout: Layout) -> dict[str, np.ndarray]:
    """Makes arrays of this process alone."""
    return {name: np.empty(shape, dtype) for name, (shape, dtype) in layout.items()}


def slot_bytes(layout: Layout) -> int:
    """Counts the bytes of one slot, which holds the arrays of a layout, each aligned."""
    return sum(_aligned(shape, dtype) for shape, dtype in layout.values())


def slot_arrays(memory: SharedMemory, slot: int, layout: Layout) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the slot's bytes as one array, and the arrays in it: views that keep the first alive."""
    size = slot_bytes(layout)
    whole = np.frombuffer(memory.map, np.uint8, count=size, offset=slot * size)
    arrays, start = {}, 0
    for name, (shape, dtype) in layout.items():
        length = int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays[name] = whole[start : start + length].view(dtype).reshape(shape)
        start += _aligned(shape, dtype)
    return whole, arrays


def _aligned(shape: tuple[int, ...], dtype: type[np.generic]) -> int:
    return -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // _ALIGN) * _ALIGN
