"""Each layout read by its own tool, in a process where this project cannot be imported.

python foreign_loaders.py FOLDER LAYOUT... FOLDER holds the exports, the pictures and pixels.pt. Each layout gets a
process of its own, a copy of one that has imported torch and nothing else, and leaves LAYOUT-answers.pt, what the tool
makes of the export, or LAYOUT-error.txt.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

CAPTIONS = ["a red ant", "two bees, at noon!", "the cat's 3 eels"]


def pictures(folder: Path) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("picture-*.png"))]


def by_description(described: dict, images: list[Image.Image]) -> torch.Tensor:
    """What the model card says, in Pillow and numpy."""
    size, rows = described["image_size"], []
    for image in images:
        scale = size / min(image.size)
        image = image.resize([max(size, int(side * scale + 1e-9)) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2) for side in image.size)
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
        rows.append((pixels - np.float32(described["mean"])) / np.float32(described["std"]))
    return torch.from_numpy(np.stack(rows).astype(np.float32)).permute(0, 3, 1, 2)


def safetensors(folder: Path, pixels: torch.Tensor) -> dict:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        described = json.loads(file.metadata()["internimage"])
        return {"state": {name: file.get_tensor(name) for name in file.keys()}, **told(described, folder)}  # noqa: SIM118


def official(folder: Path, pixels: torch.Tensor) -> dict:
    read = torch.load(folder / "model.pth", weights_only=True)
    return {"state": read["model"], **told(read["internimage"], folder)}


def told(described: dict, folder: Path) -> dict:
    return {"names": described["classes"], "own": by_description(described, pictures(folder))}


def timm(folder: Path, pixels: torch.Tensor) -> dict:
    sys.path.insert(0, str(folder / "timm"))
    import internimage_timm  # noqa: F401
    import timm

    model = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    own = torch.stack([transform(image) for image in pictures(folder)])
    return {"logits": model(pixels), "own": own, "own_logits": model(own), "names": model.pretrained_cfg["label_names"]}


def hf(folder: Path, pixels: torch.Tensor) -> dict:
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoTokenizer

    path, code = str(folder / "hf"), {"trust_remote_code": True}
    model = AutoModelForImageClassification.from_pretrained(path, **code).eval()
    own = AutoImageProcessor.from_pretrained(path)(pictures(folder), return_tensors="pt")["pixel_values"]
    both = AutoModel.from_pretrained(path, **code).eval()
    tokens = AutoTokenizer.from_pretrained(path)(CAPTIONS, padding="max_length", return_tensors="pt")["input_ids"]
    found = both(pixels, input_ids=tokens)
    names = [model.config.id2label[row] for row in range(model.config.num_labels)]
    return {
        **hf_backbone(path, pixels),
        "logits": model(pixels).logits,
        "own": own,
        "own_logits": model(own).logits,
        "names": names,
        "images": torch.nn.functional.normalize(both.get_image_features(pixels).pooler_output, dim=1),
        "texts": torch.nn.functional.normalize(both.get_text_features(tokens).pooler_output, dim=1),
        "similarity": found.logits_per_image,
    }


def hf_backbone(path: str, pixels: torch.Tensor) -> dict:
    """Maps of the stages: by the folder's class, by AutoBackbone, and by a configuration, as detectors build it."""
    from transformers import AutoBackbone, AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto import auto_factory

    own = get_class_from_dynamic_module("modeling_internimage.InternImageBackbone", path)
    stages = own.from_pretrained(path, out_indices=[0, 1, 2, 3]).eval()(pixels)
    # AutoBackbone asks the Hub whether it has a repository of the name, before it reads the folder
    auto_factory.hf_api = lambda: SimpleNamespace(repo_exists=lambda name: True)
    auto = AutoBackbone.from_pretrained(path, trust_remote_code=True, out_features=["stage2", "stage4"]).eval()
    auto.gradient_checkpointing_enable()
    with torch.enable_grad():
        auto.train()(pixels).feature_maps[1].square().mean().backward()
    assert all(parameter.grad is not None for name, parameter in auto.named_parameters() if ".blocks." in name)
    chosen = auto.eval()(pixels, output_hidden_states=True)
    built = AutoBackbone.from_config(AutoConfig.from_pretrained(path, trust_remote_code=True), trust_remote_code=True)
    return {
        "stages": stages.feature_maps,
        "chosen": chosen.feature_maps,
        "hidden": chosen.hidden_states,
        "channels": (auto.channels, built.channels),
    }


def open_clip(folder: Path, pixels: torch.Tensor) -> dict:
    sys.path.insert(0, str(folder / "open_clip"))
    import internimage_open_clip  # noqa: F401
    import open_clip

    name = f"local-dir:{folder / 'open_clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    images = model.encode_image(pixels, normalize=True)
    zero_shot = open_clip.build_zero_shot_classifier(model, tokenizer, ["ant", "bee"], ["a {}", "one {}."])
    return {
        "own": torch.stack([preprocess(image) for image in pictures(folder)]),
        "images": images,
        "texts": model.encode_text(tokenizer(CAPTIONS), normalize=True),
        "similarity": model.get_logits(pixels, tokenizer(CAPTIONS))[0],
        "zero_shot": images @ zero_shot,
    }


def onnx(folder: Path, pixels: torch.Tensor) -> dict:
    import onnx as onnx_format
    import onnxruntime

    def session(name: str) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(folder / "onnx" / name), providers=["CPUExecutionProvider"])

    model, text = session("model.onnx"), session("text.onnx")
    described = json.loads(model.get_modelmeta().custom_metadata_map["internimage"])
    own = by_description(described, pictures(folder))
    graphs = [onnx_format.load(folder / "onnx" / name) for name in ("model.onnx", "text.onnx")]

    def run(graph: onnxruntime.InferenceSession, output: str, given: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(graph.run([output], {graph.get_inputs()[0].name: given.numpy()})[0])

    images = torch.nn.functional.normalize(run(model, "vectors", pixels), dim=1)
    texts = torch.nn.functional.normalize(run(text, "vectors", torch.load(folder / "tokens.pt")), dim=1)
    return {
        "logits": torch.cat([run(model, "logits", pixels[:1]), run(model, "logits", pixels[1:])]),
        "own": own,
        "own_logits": run(model, "logits", own),
        "names": described["classes"],
        "images": images,
        "texts": texts,
        "similarity": float(np.exp(described["text"]["log_scale"])) * images @ texts.T,
        "domains": {node.domain for graph in graphs for node in graph.graph.node},
        "opset": max(entry.version for graph in graphs for entry in graph.opset_import),
    }


def pt2(folder: Path, pixels: torch.Tensor) -> dict:
    extra = {"internimage": ""}
    model = torch.export.load(folder / "model.pt2", extra_files=extra).module()
    described = json.loads(extra["internimage"])
    own = by_description(described, pictures(folder))
    logits = torch.cat([model(pixels[:1]), model(pixels[1:])])
    wide = model(torch.zeros(1, 3, 96, 160))  # another size
    assert wide.shape == (1, logits.shape[1])
    return {"logits": logits, "own": own, "own_logits": model(own), "names": described["classes"]}


def answer(layout: str, folder: Path) -> None:
    """The work of one process: it ends here."""
    try:
        os.environ["HF_HOME"] = str(folder / f"{layout}-cache")
        with torch.no_grad():
            torch.save(globals()[layout](folder, torch.load(folder / "pixels.pt")), folder / f"{layout}-answers.pt")
    except BaseException:
        (folder / f"{layout}-error.txt").write_text(traceback.format_exc())
    os._exit(0)


if __name__ == "__main__":
    for name in ("dcnv3", "pretrain", "data_pipeline", "launch"):
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it is an ImportError
    for layout in sys.argv[2:]:
        if not (child := os.fork()):
            answer(layout, Path(sys.argv[1]))
        os.waitpid(child, 0)
