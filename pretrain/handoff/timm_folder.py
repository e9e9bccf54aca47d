"""A folder that timm reads: model.safetensors under our own names, and config.json in timm's form."""

import json
from pathlib import Path

from safetensors.torch import save_file

from data_pipeline.reading.decode.centre import CROP_MODE, INTERPOLATION
from pretrain.handoff.backbone import Backbone
from pretrain.models import VARIANTS


def write_timm(backbone: Backbone, out: Path) -> Path:
    """`import pretrain.models; timm.create_model(f"local-dir:{out}", pretrained=True)` loads it (strictly, as timm
    does).
    """
    model = backbone.build()
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, out / "model.safetensors")
    arguments = {
        k: v for k, v in model.arguments.items() if k not in ("num_classes", "global_pool", "in_chans", "backend")
    }
    stride = 16 if model.use_clip_projector else 32
    config = {
        "architecture": _architecture(model.channels, model.depths),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "exported",
            "custom_load": False,
            "input_size": [model.in_chans, backbone.image_size, backbone.image_size],
            "pool_size": [backbone.image_size // stride] * 2,
            "fixed_input_size": False,
            "interpolation": INTERPOLATION,  # all three as evaluation feeds the model
            "crop_pct": 1.0,
            "crop_mode": CROP_MODE,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "num_classes": model.num_classes,
            "first_conv": "stem.conv1",
            "classifier": "head",
            "label_names": None if backbone.classes is None else list(backbone.classes),
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    description = {**backbone.description(), "arguments": model.arguments}
    (out / "internimage.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return out


def _architecture(channels: int, depths: tuple[int, ...]) -> str:
    """The registered name to build from; model_args says all that differs."""
    for name, variant in VARIANTS.items():
        if variant.arguments["channels"] == channels and tuple(variant.arguments["depths"]) == tuple(depths):
            return name
    return "internimage_t"
