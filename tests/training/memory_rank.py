"""A rank that weighs its live tensors before and after an update; a script, given pairs of configuration and output."""

import gc
import json
import os
import sys
import time
from pathlib import Path

import torch
import yaml

from pretrain.configuration import parse_config
from pretrain.training import run
from pretrain.training.zero.engine import Engine, import_deepspeed

WIDTH = 900
WEIGHED = 2  # the step that is weighed


def live_bytes(readings: int = 8) -> int:
    """Of every storage that a tensor holds, once each.

    The least of several readings: a thread of the process group may hold what was sent a moment longer.
    """
    return min(_live_bytes(0.05 if reading else 0.0) for reading in range(readings))


def _live_bytes(pause: float) -> int:
    time.sleep(pause)
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) not in (torch.Tensor, torch.nn.Parameter):
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if tensor is not None and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def main() -> None:
    os.environ["FAKE_WIDTH"] = str(WIDTH)
    step = Engine.step
    import_deepspeed()
    weights: dict[str, int] = {}
    steps = [0]

    def weighed(self: Engine, *, apply: bool) -> tuple[bool, float]:
        steps[0] += 1
        weigh = steps[0] == WEIGHED
        before = live_bytes() if weigh else 0
        result = step(self, apply=apply)
        if weigh:
            weights.update(before=before, after=live_bytes())
        return result

    Engine.step = weighed  # type: ignore[method-assign]
    for described, output in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        steps[0] = 0
        gc.collect()
        gc.freeze()  # what is there already is neither looked at nor counted: only the run's tensors are
        config = parse_config(yaml.safe_load(Path(described).read_text()))
        assert run(config, output) == 0
        rank = torch.distributed.get_rank()
        (Path(output) / f"memory-{rank}.json").write_text(json.dumps(weights))


if __name__ == "__main__":
    main()
