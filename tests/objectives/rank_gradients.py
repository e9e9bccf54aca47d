"""One rank's share of a batch through a few presets; gradients averaged over ranks, as data-parallel engines do.

python rank_gradients.py RANK WORLD_SIZE FOLDER     gloo, met through a file in FOLDER; rank 0 writes gradients.pt
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from objective_samples import make_batch, make_task, rows_of

from pretrain.objectives.keys import StepKeys

ROWS = 12
CASES = {
    "m3i": ("m3i", {}),
    "m3i, half of the pairs mixed": ("m3i", {"mix_probability": 0.5}),
    "clip": ("clip", {}),
    "clip_category": ("clip_category", {}),
    "siglip": ("siglip", {}),
    "simclr": ("simclr", {}),
    "simsiam": ("simsiam", {}),
    "moco": ("moco", {}),
    "m3i, a mask a pair, balanced, in chunks": ("m3i", {"mask": "sample", "balance": 0.3, "encode_rows": 2}),
    "siamese": ("siamese", {}),
    "supervised with mixup and cutmix": ("supervised", {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}),
    "supervised with the pooled head": ("supervised", {"overrides": {"use_clip_projector": True}}),
}


def gradients(rank: int, world: int) -> dict[str, dict[str, torch.Tensor]]:
    """case -> parameter -> gradient of the joined batch; also every loss and metric, averaged over ranks."""
    share = ROWS // world
    batch = rows_of(make_batch(ROWS), rank * share, (rank + 1) * share)
    keys = StepKeys(seed=2, step=5)
    found = {}
    for case, (preset, options) in CASES.items():
        task = make_task(preset, **options).train()
        teacher = task.teacher()
        out = task(batch, keys, task.teacher_targets(teacher, batch, keys) if teacher is not None else None)
        out.total.backward()
        values = {f"loss/{name}": part for name, part in out.parts.items()} | {"total": out.total.detach()}
        values |= {name: out.metrics[name] for name in out.metrics if name.endswith(("accuracy", "rank", "positive"))}
        values |= {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
        if world > 1:
            for value in values.values():
                dist.all_reduce(value)
                value /= world
        found[case] = values
    return found


if __name__ == "__main__":
    own, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", meeting, timedelta(seconds=300), rank=own, world_size=size)
    result = gradients(own, size)
    if own == 0:
        torch.save(result, folder / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()
