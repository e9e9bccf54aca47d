"""Writing the image encoder, and where it goes along the text tower, in the layouts that others read.

safetensors   one file, official keys, a header that says how to build the model      -> finetune, load_backbone
official      a .pth as the authors release theirs: {"model": official state dict}    -> their code and its kin
mmdet         a .pth as mmdetection and mmsegmentation save: `backbone.*`, stages alone -> their detectors, segmenters
timm          a folder for timm.create_model("local-dir:FOLDER", pretrained=True)     -> timm and its kin
hf            a folder for AutoModelForImageClassification.from_pretrained            -> transformers
open_clip     a folder for open_clip.create_model_and_transforms("local-dir:FOLDER")  -> open_clip, zero-shot
onnx          a graph, or a folder with one a tower, in standard operators            -> onnxruntime
pt2           a program of torch.export                                               -> torch alone

A card (README.md in a folder, NAME.md beside a file) says what the weights are.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.handoff.backbone import Backbone, read_backbone
from pretrain.handoff.card import write_card
from pretrain.handoff.tensors import write_pickled, write_tensors
from pretrain.models.reading import METADATA_KEY
from pretrain.training.checkpoint.disk import AUTO, run_of

_log = logging.getLogger(__name__)

# What classification/models/intern_image.py of OpenGVLab/InternImage writes out; all else is an option there.
FIXED = {"in_chans": 3, "kernel_size": 3, "mask_activation": "softmax", "share_weights": True}
PROJECTOR_FIXED = {"clip_embed_dim": 1024, "head_hidden_size": 768, "clip_heads": 16}
# What that of their detectors and segmenters writes out; it swallows options that it does not know.
STAGES_FIXED = {**FIXED, "remove_center": False}


@dataclass(frozen=True)
class OnnxOptions:
    """opset: version of the operators. free_size: the images' sides may differ from the training's (see onnx.py)."""

    opset: int = 20
    free_size: bool = False


def export(
    checkpoint: str | Path,
    to: str,
    out: str | Path,
    which: str = "ema",
    *,
    choice: str = AUTO,
    onnx: OnnxOptions | None = None,
    say: Callable[[str], None] = _log.info,
) -> Path:
    """Write the image encoder of `checkpoint` (whatever read_backbone reads) in the layout `to`; the path written.

    Teacher, decoder and predictor stay behind; the text tower goes into the layouts hf, open_clip and onnx. A file is
    written under a temporary name first, so an interrupted export leaves nothing that looks like one.

    Args:
        to: one of FORMATS.
        out: the file, or for timm and hf the folder, to write.
        which: "ema" or "model", of a run.
        choice: of a run's checkpoints, as read_backbone has it.
        onnx: of that layout alone.
        say: told what is exported, and what its reader should know.

    Raises UserError for an unknown layout, or weights that are not an InternImage.
    """
    if onnx is not None and to != "onnx":
        raise UserError(f"export to {to}: an opset and a free size are of onnx alone")
    if to not in FORMATS:
        raise UserError(f"export: {to!r} is no format; known are {', '.join(FORMATS)}")
    backbone = read_backbone(checkpoint, which, choice)
    say(f"exported: {backbone.source}")
    for notice in notices(backbone, to):
        say(f"note: {notice}")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    written = FORMATS[to](backbone, out) if onnx is None else _onnx(backbone, out, onnx)
    write_card(backbone, to, written, scores_of(backbone, Path(checkpoint)))
    return written


def notices(backbone: Backbone, to: str) -> list[str]:
    """What whoever reads the export in the layout `to` should know, one sentence each."""
    found = []
    if "head.bias" in backbone.state and backbone.classes is None:
        found.append("the classifier's rows have no names: the checkpoint keeps none")
    if to in ("official", "mmdet") and (unlike := unlike_authors(backbone.arguments, stages_alone=to == "mmdet")):
        found.append(
            f"the authors' unedited code cannot build this model, since it has no option for {', '.join(unlike)}; "
            "its weights are under their keys all the same"
        )
    if backbone.text is not None and to in ("safetensors", "official", "mmdet", "timm", "pt2"):
        found.append("the text tower stays behind: hf, open_clip and onnx (into a folder) take it along")
    return found


def unlike_authors(arguments: Mapping[str, Any] | None, stages_alone: bool = False) -> list[str]:
    """The arguments of a model that the authors' InternImage has fixed at other values, as `name value (theirs)`.

    stages_alone: of their detectors' backbone, which has no head, instead of their classifier.
    """
    given = {"use_clip_projector": False, **STAGES_FIXED, **PROJECTOR_FIXED, **(arguments or {})}
    fixed = STAGES_FIXED if stages_alone else FIXED | (PROJECTOR_FIXED if given["use_clip_projector"] else {})
    return [f"{name} {given[name]} ({value})" for name, value in fixed.items() if given[name] != value]


def scores_of(backbone: Backbone, checkpoint: Path) -> list[dict[str, Any]]:
    """What `internimage evaluate` wrote into the run about these very weights."""
    run = run_of(checkpoint)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("evaluation/*.json"))]
    return [entry for entry in found if (entry.get("checkpoint"), entry.get("weights")) == backbone.scored_as]


def write_safetensors(backbone: Backbone, out: Path) -> Path:
    out = out / "model.safetensors" if out.is_dir() else out
    return write_tensors(out, backbone.state, METADATA_KEY, json.dumps(backbone.description()))


def write_official(backbone: Backbone, out: Path) -> Path:
    out = out / "model.pth" if out.is_dir() else out
    return write_pickled(out, {"model": backbone.state, METADATA_KEY: backbone.description()})


def write_mmdet(backbone: Backbone, out: Path) -> Path:
    out = out / "model.pth" if out.is_dir() else out
    kept = ("patch_embed.", "levels.")
    state = {f"backbone.{key}": value for key, value in backbone.state.items() if key.startswith(kept)}
    return write_pickled(out, {"state_dict": state, METADATA_KEY: backbone.description()})


def _timm(backbone: Backbone, out: Path) -> Path:
    from pretrain.handoff.timm_folder import write_timm

    return write_timm(backbone, out)


def _hf(backbone: Backbone, out: Path) -> Path:
    from pretrain.handoff.huggingface import write_huggingface

    return write_huggingface(backbone, out)


def _open_clip(backbone: Backbone, out: Path) -> Path:
    from pretrain.handoff.open_clip_folder import write_open_clip

    return write_open_clip(backbone, out)


def _onnx(backbone: Backbone, out: Path, options: OnnxOptions = OnnxOptions()) -> Path:
    from pretrain.handoff.onnx import write_onnx

    return write_onnx(backbone, out, opset=options.opset, free_size=options.free_size)


def _program(backbone: Backbone, out: Path) -> Path:
    from pretrain.handoff.traced import write_program

    return write_program(backbone, out)


FORMATS: dict[str, Callable[[Backbone, Path], Path]] = {
    "safetensors": write_safetensors,
    "official": write_official,
    "mmdet": write_mmdet,
    "timm": _timm,
    "hf": _hf,
    "open_clip": _open_clip,
    "onnx": _onnx,
    "pt2": _program,
}
