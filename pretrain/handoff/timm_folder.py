"""A folder that timm reads: model.safetensors under our own names, config.json in timm's form, and, since timm knows no
InternImage, code that registers it and needs torch and timm alone.

    sys.path.insert(0, FOLDER); import internimage_timm        # where this project is installed: import pretrain.models
    timm.create_model("local-dir:FOLDER", pretrained=True)
"""

from pathlib import Path

from data_pipeline.durable import write_durably
from data_pipeline.reading.decode.centre import CROP_MODE, INTERPOLATION
from pretrain.handoff.backbone import Backbone
from pretrain.handoff.carried import model_code, own_code
from pretrain.handoff.tensors import write_json, write_tensors
from pretrain.models import VARIANTS

CODE = "internimage_timm"


def write_timm(backbone: Backbone, out: Path) -> Path:
    """Write the folder `out`; timm loads it strictly."""
    model = backbone.build()
    (out / CODE).mkdir(parents=True, exist_ok=True)
    for name, content in model_code().items():
        write_durably(out / CODE / name, content)
    write_durably(out / CODE / "__init__.py", own_code("registration_timm"))
    write_tensors(out / "model.safetensors", model.state_dict(), "format", "pt")
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
    write_json(out / "config.json", config)
    write_json(out / "internimage.json", {**backbone.description(), "arguments": model.arguments})
    return out


def _architecture(channels: int, depths: tuple[int, ...]) -> str:
    """The registered name to build from; model_args says all that differs."""
    for name, variant in VARIANTS.items():
        if variant.arguments["channels"] == channels and tuple(variant.arguments["depths"]) == tuple(depths):
            return name
    return "internimage_t"
