"""One rank of test_batch_norm's two: python batch_norm_rank.py RANK PORT OUT.json"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.models.layers import GlobalBatchNorm

ROWS = (5, 3)  # ranks may hold different numbers of samples
CASES = {  # dtype, compiled
    "float32": (torch.float32, False),
    "float32, compiled": (torch.float32, True),
    "float64": (torch.float64, False),
    "bfloat16": (torch.bfloat16, False),
}


def inputs(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Of both ranks, as `dtype` rounds them, in float64."""
    x = torch.randn(sum(ROWS), 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    return x.to(dtype).double()


def loss(y: torch.Tensor, rows: slice, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    weights = torch.randn(sum(ROWS), 2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (y * weights[rows].to(dtype).to(y.dtype)).sum()


def answer(rank: int, dtype: torch.dtype, compiled: bool) -> dict[str, list]:
    rows = slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], None)
    x = inputs(dtype)[rows].to(dtype).requires_grad_()
    norm = GlobalBatchNorm(4).to(dtype)
    y = (torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm)(x)
    loss(y, rows, dtype).backward()
    assert x.grad is not None and norm.weight.grad is not None and y.dtype == x.grad.dtype == dtype
    tensors = {
        "y": y,
        "grad_x": x.grad,
        "grad_weight": norm.weight.grad,
        "mean": norm.running_mean,
        "var": norm.running_var,
    }
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def main() -> None:
    rank, port, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    out.write_text(json.dumps({name: answer(rank, *case) for name, case in CASES.items()}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
