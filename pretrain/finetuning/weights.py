"""Which weights a fine-tuning starts from: the backbone as it is, a new classifier, or rows of the old one."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.handoff import read_backbone
from pretrain.models import InternImage, official

CLASSIFIER = "head."
# What stands between the stages and the classifier, by official key. A pretraining with text pools otherwise than
# InternImage-T to -XL classify: where the file has none of a part, the model keeps its own, new one.
POOLING = (("conv_head.",), ("dcnv3_head_x3.", "dcnv3_head_x4.", "clip_projector.", "fc_norm."))


def load_into(
    model: InternImage, source: Path | str, *, head_rows: Tensor | None = None, which: str = "ema"
) -> list[str]:
    """Put the image encoder of `source` into `model`; its classifier stays new without `head_rows`.

    Args:
        source: run directory, checkpoint, exported folder or file (.safetensors, .pth), or an official checkpoint.
        head_rows: int64 [num_classes], the row of the source's classifier that each class starts from.

    Returns the official keys of the model that are new. Raises UserError where the backbones differ.
    """
    backbone = read_backbone(source, which)
    state = official.normalize_layout(backbone.state)
    own = official.state_dict(model)
    if head_rows is not None and len(head_rows) != model.num_classes:
        raise UserError(
            f"head_rows: {len(head_rows)} rows were given for {model.num_classes} classes; one row a class is needed"
        )
    allow = set()
    if head_rows is None:
        state = {key: value for key, value in state.items() if not key.startswith(CLASSIFIER)}
        allow.add(CLASSIFIER)
    for part in POOLING:
        held = [key for key in state if key.startswith(part)]
        wanted = [key for key in own if key.startswith(part)]
        if wanted and not held:
            allow |= set(wanted)
        elif held and not wanted:
            allow |= set(held)
    try:
        listing = official.load_state_dict(model, state, allow=allow, head_rows=head_rows)
    except UserError as error:
        raise UserError(f"{source} does not fit the model that is configured to be fine-tuned: {error}") from None
    new = sorted(listing.missing)
    logging.getLogger(__name__).info("started from %s; new: %s", source, ", ".join(new) or "nothing")
    return new


def read_rows(path: Path | str, classes: int) -> Tensor:
    """Rows of a classifier from a text file: one number a line, line i for class i. int64 [classes]."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
        rows = torch.tensor([int(line) for line in lines])
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: a text file with one row number a line was expected: {error}") from None
    if len(rows) != classes:
        raise UserError(f"{path}: {len(rows)} rows for {classes} classes; one row a class is needed")
    return rows
