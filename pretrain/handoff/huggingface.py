"""A folder for transformers that needs nothing of this project: code, configuration, weights and image processor.

    AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)   # logits, where there are classes
    AutoModel.from_pretrained(folder, trust_remote_code=True)                         # the last map, the pooled vector
    AutoBackbone.from_pretrained(folder, trust_remote_code=True, out_indices=...)     # maps of the stages
    AutoModel...get_image_features(pixel_values), get_text_features(input_ids)        # with a text tower
    AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

The code is this project's own modules, copied with their imports made relative; where the dcnv3 package is installed
the copy uses its compiled operator, elsewhere the operator in plain PyTorch that travels along.
"""

from pathlib import Path

import torch

from data_pipeline.durable import write_durably
from pretrain.handoff.backbone import Backbone
from pretrain.handoff.carried import model_code, own_code
from pretrain.handoff.tensors import write_json, write_tensors
from pretrain.handoff.text import write_tokenizer

NO_NAME = "LABEL_{}"  # what transformers calls a class without a name
_OWN = ("configuration_internimage", "modeling_internimage", "text_internimage")


def write_huggingface(backbone: Backbone, out: Path) -> Path:
    """Write the folder `out`. Without a classifier, AutoModelForImageClassification wants num_labels for a new one."""
    model = backbone.build()
    out.mkdir(parents=True, exist_ok=True)
    for name, content in remote_code().items():
        write_durably(out / name, content)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    if backbone.text is not None:
        state |= {f"text.{name}": value for name, value in backbone.text.state.items()}
        state["logit_scale"] = torch.tensor(backbone.text.log_scale)
        if backbone.text.bias is not None:
            state["logit_bias"] = torch.tensor(backbone.text.bias)
        write_tokenizer(backbone.text, out)
    write_tensors(out / "model.safetensors", state, "format", "pt")
    classes = backbone.classes or tuple(NO_NAME.format(index) for index in range(model.num_classes))
    classifier = "InternImageForImageClassification"
    config = {
        "architectures": [classifier if model.num_classes else "InternImageModel"],
        "auto_map": {
            "AutoConfig": "configuration_internimage.InternImageConfig",
            "AutoModel": "modeling_internimage.InternImageModel",
            "AutoBackbone": "modeling_internimage.InternImageBackbone",
            "AutoModelForImageClassification": f"modeling_internimage.{classifier}",
            "AutoModelForZeroShotImageClassification": "modeling_internimage.InternImageModel",
        },
        "model_type": "internimage",
        "arguments": {name: value for name, value in model.arguments.items() if name != "backend"},
        "image_size": backbone.image_size,
        "num_channels": model.in_chans,
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
        "text": None if backbone.text is None else backbone.text.sizes,
        "sigmoid": backbone.text is not None and backbone.text.bias is not None,
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
    write_json(out / "config.json", config)
    write_json(out / "preprocessor_config.json", processor)
    return out


def remote_code() -> dict[str, str]:
    """File name -> text of the code that the folder carries, flat, as transformers' loader wants it."""
    return model_code() | {f"{name}.py": own_code(name) for name in _OWN}
