"""A folder for transformers that needs nothing of this project: code, configuration, weights and image processor.

    AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)   # logits, where there are classes
    AutoModel.from_pretrained(folder, trust_remote_code=True)                         # the last map, the pooled vector
    AutoImageProcessor.from_pretrained(folder)

The code is this project's own modules, copied with their imports made relative; where the dcnv3 package is installed
the copy uses its compiled operator, elsewhere the operator in plain PyTorch that travels along.
"""

import json
import re
from importlib import resources
from pathlib import Path

from safetensors.torch import save_file

from pretrain.handoff.backbone import Backbone

NO_NAME = "LABEL_{}"  # what transformers calls a class without a name
_MODELS = (
    *("internimage", "heads", "layers", "linear", "randomness", "timm_features"),
    *("activations", "compilation", "recomputation"),
)
_SHARED = ("errors", "hashing")  # of data_pipeline
_OPERATOR = ("geometry", "reference", "module")
_CHOICE = '''"""The compiled operator's layer where the dcnv3 package is installed, else the same in plain PyTorch."""

try:
    from dcnv3 import DCNv3
except ImportError:
    from .dcnv3_module import DCNv3

__all__ = ["DCNv3"]
'''
_PLAIN_OPERATOR = '''"""The operator in plain PyTorch."""

from .dcnv3_geometry import check_tensors, make_geometry
from .dcnv3_reference import dcnv3_reference, packed_reference


def dcnv3(value, offset, mask, *, backend=None, **options):
    geometry = make_geometry(**options)
    check_tensors(value, offset, mask, geometry)
    return dcnv3_reference(value, offset, mask, geometry)


def packed_dcnv3(value, packed, geometry, *, center, backend=None):
    return packed_reference(value, packed, geometry, center)
'''


def write_huggingface(backbone: Backbone, out: Path) -> Path:
    """Write the folder `out`. Without a classifier, AutoModelForImageClassification wants num_labels for a new one."""
    model = backbone.build()
    out.mkdir(parents=True, exist_ok=True)
    for name, text in remote_code().items():
        (out / name).write_text(text, encoding="utf-8")
    state = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    classes = backbone.classes or tuple(NO_NAME.format(index) for index in range(model.num_classes))
    classifier = "InternImageForImageClassification"
    config = {
        "architectures": [classifier if model.num_classes else "InternImageModel"],
        "auto_map": {
            "AutoConfig": "configuration_internimage.InternImageConfig",
            "AutoModel": "modeling_internimage.InternImageModel",
            "AutoModelForImageClassification": f"modeling_internimage.{classifier}",
        },
        "model_type": "internimage",
        "arguments": {name: value for name, value in model.arguments.items() if name != "backend"},
        "image_size": backbone.image_size,
        "num_channels": model.in_chans,
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
        "origin": backbone.origin,
        "id2label": {str(index): label for index, label in enumerate(classes)},
        "label2id": {label: index for index, label in enumerate(classes)},
        "dtype": "float32",
    }
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": backbone.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": backbone.image_size, "width": backbone.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
        "do_convert_rgb": True,
    }
    for name, content in (("config", config), ("preprocessor_config", processor)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return out


def remote_code() -> dict[str, str]:
    """File name -> text of the code that the folder carries, flat, as transformers' loader wants it."""
    models, operator = resources.files("pretrain.models"), resources.files("dcnv3")
    here = resources.files("pretrain.handoff") / "remote_code"
    files = {
        "internimage_dcnv3.py": _CHOICE,
        "dcnv3_operator.py": _PLAIN_OPERATOR,
        "configuration_internimage.py": (here / "configuration_internimage.py").read_text(encoding="utf-8"),
        "modeling_internimage.py": (here / "modeling_internimage.py").read_text(encoding="utf-8"),
    }
    for name in _SHARED:
        files[f"internimage_{name}.py"] = (resources.files("data_pipeline") / f"{name}.py").read_text(encoding="utf-8")
    for name in _MODELS:
        files[f"internimage_{name}.py"] = _relative((models / f"{name}.py").read_text(encoding="utf-8"))
    for name in _OPERATOR:
        files[f"dcnv3_{name}.py"] = _relative((operator / f"{name}.py").read_text(encoding="utf-8"))
    return files


def _relative(source: str) -> str:
    source = re.sub(r"^from pretrain\.models\.(\w+) import", r"from .internimage_\1 import", source, flags=re.MULTILINE)
    source = re.sub(r"^from data_pipeline\.(\w+) import", r"from .internimage_\1 import", source, flags=re.MULTILINE)
    source = re.sub(r"^from dcnv3 import", "from .internimage_dcnv3 import", source, flags=re.MULTILINE)
    return re.sub(r"^from dcnv3\.(\w+) import", r"from .dcnv3_\1 import", source, flags=re.MULTILINE)
