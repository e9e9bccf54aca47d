"""The model as a program of torch.export (.pt2): runs with torch alone, any batch, any size in steps of 32 pixels (the
size of a model whose own is no such step is fixed).
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline.durable import atomic_path
from dcnv3 import DCNv3
from pretrain.handoff.backbone import Backbone
from pretrain.models.reading import METADATA_KEY

STEP = 32  # pixels: the stride of the last stage
MOST_STEPS = 256


def write_program(backbone: Backbone, out: Path) -> Path:
    """Write `out` (model.pt2 in it, where it is a folder): normalised images -> logits, or without a classifier the
    vector that one would read.

    torch.export.load(out, extra_files={"internimage": ""}) gives it, and what is known of it as JSON.
    """
    out = out / "model.pt2" if out.is_dir() else out
    model, free = backbone.build(), free_images()
    use_reference_operator(model)
    if backbone.image_size % STEP or backbone.image_size < 2 * STEP:
        free = {0: free[0]}
    program = torch.export.export(model, (example(backbone),), dynamic_shapes={"x": free})
    with atomic_path(out) as temporary, open(temporary, "wb") as file:
        torch.export.save(program, file, extra_files={METADATA_KEY: json.dumps(backbone.description())})
    return out


def example(backbone: Backbone) -> Tensor:
    """Two images: what is one would be taken for a fixed size."""
    channels = backbone.state["patch_embed.conv1.weight"].shape[1]
    return torch.zeros(2, channels, backbone.image_size, backbone.image_size)


def free_images() -> dict[int, object]:
    """Dimensions of [B, C, H, W] that may differ at each call: the batch, and both sides as multiples of STEP."""
    rows, columns = (torch.export.Dim(name, min=2, max=MOST_STEPS) for name in ("rows", "columns"))
    return {0: torch.export.Dim("batch", min=1), 2: STEP * rows, 3: STEP * columns}


def use_reference_operator(model: nn.Module) -> None:
    """Every DCNv3 in plain PyTorch operations, which export knows."""
    for module in model.modules():
        if isinstance(module, DCNv3):
            module.backend = "reference"
