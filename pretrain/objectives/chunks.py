"""A batch encoded a few rows at a time, for losses that need all of its vectors at once.

    forward    for each chunk: encode, keep the vectors, forget the activations
               loss of all vectors
    backward   the loss's gradient at each vector; for each chunk: encode again, back-propagate

The gradient is that of the whole batch; activations are those of one chunk, and the encoder runs forward twice. This is
GradCache (Gao et al. 2021, arXiv 2101.06983), here by recomputation. Layers that draw are given their samples' keys, so
that the second pass sees what the first saw.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(function: Callable[..., Tensor], rows: int | None, *inputs: Tensor) -> Tensor:
    """function(*inputs), `rows` rows at a time. function: row by row, each the same whatever stands beside it; its
    inputs and its output have the batch in front. rows None: all at once, and nothing is recomputed.
    """
    if rows is None or len(inputs[0]) <= rows or not torch.is_grad_enabled():
        return function(*inputs)
    parts = [
        checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(*(x.split(rows) for x in inputs), strict=True)
    ]
    return torch.cat(parts)
