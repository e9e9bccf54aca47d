"""Weights and inputs for the golden cases, from a rule instead of a file.

Every tensor is a pure function of its name and shape, bit for bit the same on any machine
(splitmix64 on the element index, keyed by the CRC-32 of the name), so that a case of a
billion parameters needs no storage. README.md beside this says what the cases hold.
"""

import math
import zlib

import numpy as np


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 array of `shape`, uniform in [-1, 1), fixed by `name`."""
    n = math.prod(shape)
    z = np.arange(n, dtype=np.uint64) + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32))
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the entry `name` of an official InternImage state dict."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    u = uniform(name, shape)
    if name.endswith("running_var"):
        return 1 + np.float32(0.5) * np.abs(u)
    if len(shape) >= 2:  # a linear or convolution weight: unit-variance outputs
        return u * np.float32(math.sqrt(3 / math.prod(shape[1:])))
    if name.endswith(("gamma1", "gamma2")):
        return np.float32(0.5) + np.float32(0.25) * u
    if name.endswith("weight"):  # a norm's scale
        return 1 + np.float32(0.1) * u
    return np.float32(0.1) * u  # biases and running means
