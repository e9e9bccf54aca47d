"""One rank of test_batch_norm's two: python batch_norm_rank.py RANK PORT OUT.json"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.models.layers import GlobalBatchNorm

ROWS = (5, 3)  # ranks may hold different numbers of samples


def inputs() -> torch.Tensor:
    return torch.randn(sum(ROWS), 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1


def loss(y: torch.Tensor, rows: slice) -> torch.Tensor:
    weights = torch.randn(sum(ROWS), 2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (y * weights[rows].to(y.dtype)).sum()


def main() -> None:
    rank, port, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows = slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], None)
    x = inputs()[rows].float().requires_grad_()
    norm = GlobalBatchNorm(4)
    y = norm(x)
    loss(y, rows).backward()
    tensors = {
        "y": y,
        "grad_x": x.grad,
        "grad_weight": norm.weight.grad,
        "mean": norm.running_mean,
        "var": norm.running_var,
    }
    out.write_text(json.dumps({name: tensor.tolist() for name, tensor in tensors.items()}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
