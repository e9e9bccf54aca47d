"""A folder that open_clip reads: both towers, the configuration of a custom model, code that registers the image tower.

sys.path.insert(0, FOLDER); import internimage_open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from data_pipeline.durable import write_durably
from data_pipeline.reading.decode.centre import INTERPOLATION
from pretrain.handoff.backbone import Backbone
from pretrain.handoff.carried import model_code, own_code
from pretrain.handoff.tensors import write_json, write_tensors
from pretrain.handoff.text import has_own_vocabulary, needed, write_tokenizer
from pretrain.models.reading import METADATA_KEY

CODE = "internimage_open_clip"


def write_open_clip(backbone: Backbone, out: Path) -> Path:
    """Write the folder `out`; the classifier by labels stays behind. Raises UserError without a text tower."""
    text, model = needed(backbone.text, "open_clip"), backbone.build()
    code = out / CODE
    code.mkdir(parents=True, exist_ok=True)
    arguments = {name: value for name, value in model.arguments.items() if name != "backend"} | {"num_classes": 0}
    # Not "internimage_...": who asks timm for InternImages gets those that classify, not this folder's tower.
    name = f"clip_internimage_{hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:8]}"
    for file, content in model_code().items():
        write_durably(code / file, content)
    write_durably(code / "__init__.py", own_code("registration_open_clip"))
    write_json(code / "tower.json", {"name": name, "arguments": arguments})
    towers = {f"visual.trunk.{key}": value for key, value in model.state_dict().items() if not key.startswith("head.")}
    towers |= {f"text.{key}": value for key, value in text.state.items()}
    towers["logit_scale"] = torch.tensor(text.log_scale)
    if text.bias is not None:
        towers["logit_bias"] = torch.tensor(text.bias)
    described = {**backbone.description(), "arguments": arguments, "classes": None}
    write_tensors(out / "open_clip_model.safetensors", towers, METADATA_KEY, json.dumps(described))
    write_json(out / "open_clip_config.json", _configuration(backbone, name))
    if has_own_vocabulary(text):
        write_tokenizer(text, out)
    return out


def _configuration(backbone: Backbone, name: str) -> dict[str, Any]:
    text = needed(backbone.text, "open_clip")
    sizes = {key: value for key, value in text.sizes.items() if key != "embed_dim"}
    # open_clip reads a tokenizer of this folder where there is any name, else it takes CLIP's own.
    own = {"hf_tokenizer_name": "this folder"} if has_own_vocabulary(text) else {}
    return {
        "model_cfg": {
            "embed_dim": text.sizes["embed_dim"],
            "custom_text": True,
            **({} if text.bias is None else {"init_logit_bias": text.bias}),
            "vision_cfg": {
                "timm_model_name": name,
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "none",
                "image_size": backbone.image_size,
            },
            "text_cfg": {**sizes, **own},
        },
        "preprocess_cfg": {
            "size": [backbone.image_size] * 2,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "interpolation": INTERPOLATION,
            "resize_mode": "shortest",
        },
    }
