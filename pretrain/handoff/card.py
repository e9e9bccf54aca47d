"""The card of an export: data, objective, steps, scores beside their baselines, lineage, digests, citation."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.durable import file_sha256, write_durably
from pretrain import __version__
from pretrain.handoff.backbone import Backbone

CITATION = """```bibtex
@inproceedings{wang2023internimage,
  title={InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions},
  author={Wang, Wenhai and Dai, Jifeng and Chen, Zhe and Huang, Zhenhang and Li, Zhiqi and Zhu, Xizhou and Hu, Xiaowei
    and Lu, Tong and Lu, Lewei and Li, Hongsheng and Wang, Xiaogang and Qiao, Yu},
  booktitle={CVPR}, year={2023}
}
@inproceedings{su2023m3i,
  title={Towards All-in-one Pre-training via Maximizing Multi-modal Mutual Information},
  author={Su, Weijie and Zhu, Xizhou and Tao, Chenxin and Lu, Lewei and Li, Bin and Huang, Gao and Qiao, Yu
    and Wang, Xiaogang and Zhou, Jie and Dai, Jifeng},
  booktitle={CVPR}, year={2023}
}
```"""

USE = {
    "safetensors": "`internimage finetune CONFIG --from {name}`, or in Python "
    '`pretrain.handoff.read_backbone("{name}").build()`.',
    "official": 'The authors\' code: `model.load_state_dict(torch.load("{name}", weights_only=True)["model"])`.',
    "mmdet": "The detectors and segmenters of the authors' code: "
    '`init_cfg=dict(type="Pretrained", checkpoint="{name}")`.',
    "timm": "With torch and timm alone:\n\n```python\nimport sys, timm\nsys.path.insert(0, FOLDER)  # this folder\n"
    'import internimage_timm\nmodel = timm.create_model(f"local-dir:{{FOLDER}}", pretrained=True)\n```',
    "hf": "With torch, timm and transformers:\n\n```python\nfrom transformers import AutoImageProcessor, AutoModel\n"
    "model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)  # this folder\n"
    "processor = AutoImageProcessor.from_pretrained(FOLDER)\n```",
    "open_clip": "With open_clip (transformers too, where the folder has a vocabulary of its own):\n\n```python\n"
    "import sys, open_clip\nsys.path.insert(0, FOLDER)  # this folder\nimport internimage_open_clip\n"
    'model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{{FOLDER}}")\n'
    'tokenizer = open_clip.get_tokenizer(f"local-dir:{{FOLDER}}")\n```',
    "onnx": "onnxruntime; normalised images `[B, C, S, S]` in, any batch.",
    "pt2": '`torch.export.load("{name}").module()(images)`; normalised images `[B, C, H, W]`, any batch, both sides a '
    "multiple of 32 (64 at least).",
}


def write_card(backbone: Backbone, to: str, written: Path, results: Iterable[Mapping[str, Any]]) -> Path:
    """README.md in an exported folder; NAME.md beside an exported file. results: scores of these very weights."""
    path = written / "README.md" if written.is_dir() else written.with_name(f"{written.name}.md")
    files = sorted(written.rglob("*")) if written.is_dir() else [written]
    digests = {
        str(file.relative_to(written) if written.is_dir() else file.name): file_sha256(file)
        for file in files
        if file.is_file() and file != path and file.suffix in (".safetensors", ".pth", ".onnx", ".data", ".pt2")
    }
    write_durably(path, card(backbone, to, written.name, list(results), digests))
    return path


def card(backbone: Backbone, to: str, name: str, results: list[Mapping[str, Any]], digests: Mapping[str, str]) -> str:
    """The text. digests: SHA-256 by file."""
    origin, licences = backbone.origin, sorted(_licences(backbone.origin.get("sources", ())))
    tags = "".join(f"- {tag}\n" for tag in ("internimage", "image-classification", "deformable-convolution"))
    sections = [
        f"---\nlicense: other\nlibrary_name: {_library(to)}\ntags:\n{tags}---\n",
        f"# {name}\n\n{_model(backbone)}\n",
        f"## Use\n\n{USE[to].format(name=name)}\n\n{_input(backbone)}\n",
        f"## Training\n\n{_training(origin)}\n",
        f"## Scores\n\n{_scores(results)}\n",
        "## Licence\n\nThe licence of these weights is for whoever publishes them to state. "
        + (f"Licences of the data: {'; '.join(licences)}.\n" if licences else "The sets name no licence.\n"),
        f"## Lineage and digests\n\n{_lineage(origin)}\n\nSHA-256 of the weights by the official keys: "
        f"`{weights_digest(backbone)}`\n\n" + "".join(f"- `{file}`: `{digest}`\n" for file, digest in digests.items()),
        f"## Citation\n\n{CITATION}\n",
    ]
    return "\n".join(sections)


def weights_digest(backbone: Backbone) -> str:
    """SHA-256 over names, shapes and values of the image encoder: equal in every layout and for every run of it."""
    digest = hashlib.sha256()
    for key in sorted(backbone.state):
        value = backbone.state[key].contiguous()
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _library(to: str) -> str:
    return {"timm": "timm", "hf": "transformers", "open_clip": "open_clip", "onnx": "onnx"}.get(to, "pytorch")


def _model(backbone: Backbone) -> str:
    arguments, count = backbone.arguments or {}, sum(value.numel() for value in backbone.state.values())
    shape = ", ".join(f"{key} {arguments[key]}" for key in ("channels", "depths", "groups") if key in arguments)
    text = "" if backbone.text is None else " A text tower of CLIP's kind is trained with it."
    return f"InternImage, {count / 1e6:.1f} M values ({shape}).{text}"


def _input(backbone: Backbone) -> str:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (backbone.mean, backbone.std))
    names = "The classifier's rows have no names."
    if backbone.classes is not None:
        shown = ", ".join(backbone.classes[:10]) + (", ..." if len(backbone.classes) > 10 else "")
        names = f"{len(backbone.classes)} classes, in the order of the rows: {shown}."
    elif "head.bias" not in backbone.state:
        names = "It has no classifier."
    return (
        f"Images: RGB, the shorter side to {backbone.image_size} px (bicubic, antialiased), the centre square, scaled "
        f"to [0, 1], minus mean ({mean}), over standard deviation ({std}). {names}"
    )


def _training(origin: Mapping[str, Any]) -> str:
    if not origin:
        return "Not known: the weights came from a file that says nothing of their training."
    task = origin.get("task") or {}
    name = task.get("preset") or task.get("name") or "unknown"
    steps, images = origin.get("step"), origin.get("images")
    lines = [f"Objective `{name}`."]
    if steps:
        lines = [f"Objective `{name}`, {steps:,} steps, {images:,} images seen; {origin.get('weights')}."]
    for source in origin.get("sources", ()):
        about = source.get("about") or {}
        credit = f" {about['attribution']}" if about.get("attribution") else ""
        lines.append(
            f"- {source['name']}: {source['samples']:,} samples, weight {source['weight']:g}, manifest SHA-256 "
            f"`{source['digest']}`.{credit}"
        )
    return "\n".join([lines[0], "", *lines[1:]])


def _licences(sources: Iterable[Mapping[str, Any]]) -> set[str]:
    found = ((source["name"], (source.get("about") or {}).get("license")) for source in sources)
    return {f"{name}: {licence}" for name, licence in found if licence}


def _scores(results: list[Mapping[str, Any]]) -> str:
    rows = []
    for result in results:
        for score in result["scores"]:
            low, high = score["interval"]
            beside = {"chance": score["chance"], **score["beside"]}
            told = ", ".join(f"{label} {value:.3f}" for label, value in beside.items())
            what = f"{result['title']} ({result['set']}, {result['samples']} samples): {score['title']}"
            rows.append(f"| {what} | {score['value']:.3f} | {low:.3f} to {high:.3f} | {told} |")
    if not rows:
        return "None were measured on these weights."
    return "\n".join(["| score | value | 95 % interval | beside |", "|--|--|--|--|", *rows])


def _lineage(origin: Mapping[str, Any]) -> str:
    source = origin.get("started_from")
    start = f"Started from `{source}`." if source else "Started from random weights, as far as the run says."
    return f"Written by internimage-pretrain {__version__}. {start}"
