"""Dense tasks small enough for a test, as configurations; also the script of a rank, given pairs of configuration and
output.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from pretrain.configuration import RunConfig, parse_config

MASK2FORMER = {
    "width": 32, "hidden": 32, "encoder_hidden": 32, "heads": 2, "queries": 10, "encoder_layers": 1,
    "decoder_layers": 2, "points": 128,
}  # fmt: skip
SECTIONS: dict[str, dict[str, Any]] = {
    "detection": {"width": 32, "hidden": 64, "anchors": [8, 16, 32, 64, 128]},
    "instance": {"width": 32, "hidden": 64, "anchors": [8, 16, 32, 64, 128]},
    "query_detection": {"width": 64, "hidden": 32, "heads": 2, "queries": 20, "encoder_layers": 1, "decoder_layers": 2},
    "semantic": {"width": 16, "auxiliary_width": 16},
    "query_segmentation": {"mask2former": MASK2FORMER},
    "query_instance": {"mask2former": MASK2FORMER},
}
LABEL_MAPS = ("semantic", "query_segmentation")  # tasks that learn from these instead of objects
# Region proposals of nearly equal scores change places by the last bit; at a small lr the runs stay together.
LR = {"instance": 2e-5, "detection": 5e-4}


def tiny(task: str, folder: Path, *, steps: int = 20, every_steps: int | None = None, **training: Any) -> RunConfig:
    """Views of 48 or 64 px on the shorter side, in batches of six: a joined batch has pictures of several sizes."""
    raw = {
        "model": {
            "name": "custom",
            "overrides": {
                "channels": 16,
                "depths": [1, 1, 2, 1],
                "groups": [1, 2, 4, 8],
                "layer_scale": 0.1,
                "drop_path_rate": 0.2,
                "init_std": None,
            },
        },
        "task": {"name": task, **SECTIONS[task]},
        "data": {
            "image_size": 96,
            "views": 1,
            "workers": 0,
            "rectangle": {"shorter": [48, 64], "longer": 96, "scale": [0.9, 1.1]},
            "sources": [{"path": str(folder)}],
        },
        # A larger eps: rounding errors of gradients that are 0 by symmetry are not to become whole steps.
        "optimizer": {"lr": LR.get(task, 1e-3), "eps": 1e-4, "layer_decay": 0.9, "offset_lr_scale": 0.1},
        "schedule": {"steps": steps, "warmup_steps": 2},
        "training": {"batch_size": 6, "precision": "fp32", "log_every": 1, "zero_stage": 1, **training},
        "checkpoint": {"every_steps": every_steps},
    }
    return parse_config(raw)


if __name__ == "__main__":
    from data_pipeline.errors import STOPPED
    from pretrain.training import run
    from pretrain.training.distributed import leave

    for described, where in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        code = run(parse_config(yaml.safe_load(Path(described).read_text())), where)
        if code not in (0, STOPPED):
            leave(code)
    leave(0)
