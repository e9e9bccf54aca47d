"""Time and memory of one training step of Mask R-CNN-T at 800 px and UperNet-B at 512 px, one picture, on the CPU.

    python benchmarks/dense_steps.py [--side 128 to try it]

Each in a process of its own, whose peak resident size includes the libraries. Kept in results/dense_steps.json, where
no other side is given.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

CASES = {"mask_rcnn_t_800": ("mask_rcnn_1x_coco", [], 800), "upernet_b_512": ("upernet_160k_ade20k", ["b"], 512)}
RESULTS = Path(__file__).parent / "results" / "dense_steps.json"


def step(name: str, side: int) -> dict[str, float]:
    import torch

    from data_pipeline.reading.batch import Batch
    from data_pipeline.reading.dense import LabelMapTargets, ObjectTargets
    from pretrain.configuration import load_config
    from pretrain.objectives.keys import StepKeys
    from pretrain.tasks.task import task_of

    recipe, variant, _ = CASES[name]
    config = load_config(recipe, [f"model.name=internimage_{one}" for one in variant])
    torch.manual_seed(0)
    module = task_of(config).build(config.model, config.data, classes=80).train()
    sizes = torch.tensor([[side, side]])
    corners = [[50.0 * n, 40.0 * n, 50.0 * n + 200, 40.0 * n + 160] for n in range(1, 8)]  # of 800 x 800
    boxes = torch.tensor(corners) * side / 800
    masks = torch.zeros(len(boxes), side, side, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    targets = (
        LabelMapTargets(sizes, torch.randint(0, 80, (1, side, side), dtype=torch.uint8))
        if variant
        else ObjectTargets(sizes, (boxes,), (torch.arange(len(boxes)),), (masks,))
    )
    views = torch.randint(0, 256, (1, 1, side, side, 3), dtype=torch.uint8)
    batch = Batch(0, 0, torch.tensor([0]), views, torch.zeros(1, 1, 6), targets)
    adam = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
    seconds, processor = [], []
    for number in range(2):
        began, spent = time.perf_counter(), time.process_time()
        module(batch, StepKeys(0, number), None, False).total.backward()
        adam.step()
        adam.zero_grad()
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - spent)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": min(seconds), "processor_seconds": min(processor), "peak_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=tuple(CASES), help="in this process, its figures as JSON")
    parser.add_argument("--side", type=int, help="of the picture, pixels, in place of the case's own")
    given = parser.parse_args()
    if given.case:
        print(json.dumps(step(given.case, given.side or CASES[given.case][2])))
        return
    from machine import machine

    found = {}
    for name in CASES:
        words = [sys.executable, __file__, "--case", name, *(["--side", str(given.side)] if given.side else [])]
        said = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
        found[name] = json.loads(said.splitlines()[-1])
        print(f"{name}: {found[name]['seconds']:.1f} s, {found[name]['peak_gib']:.1f} GiB")
    if given.side:
        return
    about = {"machine": machine("torch", "torchvision", "transformers"), "steps": found}
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
