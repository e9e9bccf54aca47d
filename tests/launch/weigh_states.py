"""A rank that weighs its live tensors between backward pass and update, and in the update; a script: CONFIG OUTPUT."""

import gc
import json
import sys
from pathlib import Path

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from pretrain.configuration import load_config
from pretrain.training import run
from pretrain.training.zero.engine import Engine
from pretrain.training.zero.optimizer import GuardedAdamW


def live_bytes() -> int:
    """Of every storage that a tensor holds, once each; buffers of less than a page aside."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(size for size in storages.values() if size >= 4096)


def main() -> None:
    step, adam, seen, inside = Engine.step, GuardedAdamW.step, [], []

    def updating(self: GuardedAdamW, closure: object = None) -> object:
        inside.append(live_bytes())
        return adam(self)

    GuardedAdamW.step = updating  # type: ignore[method-assign, assignment]

    def freeing(self: DeepSpeedZeroOptimizer, parameters: object) -> object:
        inside.append(live_bytes())  # a group's gradients are there twice: as they were reduced, and flat in fp32
        return free(self, parameters)

    free = DeepSpeedZeroOptimizer.free_grad_in_param_list
    DeepSpeedZeroOptimizer.free_grad_in_param_list = freeing

    def weighed(self: Engine, *, apply: bool) -> tuple[bool, float]:
        seen.append(live_bytes())
        return step(self, apply=apply)

    Engine.step = weighed  # type: ignore[method-assign]
    output = Path(sys.argv[2])
    code = run(load_config(sys.argv[1], sys.argv[3:]), output)
    (output / f"weights-{torch.distributed.get_rank()}.json").write_text(json.dumps({"before": seen, "in": inside}))
    sys.exit(code)


if __name__ == "__main__":
    main()
