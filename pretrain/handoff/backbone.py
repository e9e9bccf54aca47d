"""The image encoder of a run, a checkpoint, or a weight file, and its text tower where it has one: weights, and what is
needed to build them again.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError, first_ten
from pretrain.handoff.text import BIAS, SCALE, Text, text_of
from pretrain.handoff.text import PREFIX as TEXT_PREFIX
from pretrain.models import VARIANTS, InternImage, create_model, official
from pretrain.models.reading import open_weights
from pretrain.tasks.class_names import row_names
from pretrain.tasks.module import image_of
from pretrain.tasks.task import module_of, task_of
from pretrain.training.checkpoint.disk import AUTO, find_checkpoint, is_run

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RUN_ONLY = (".onnx", ".pt2")
IMAGE_PREFIX = "image."  # the encoder within a task's state dict


@dataclass
class Backbone:
    """Weights under the official keys, and how to build and feed the model.

    arguments: of InternImage; None where a foreign file does not say and its shapes fit no published variant.
    """

    state: dict[str, Tensor]
    arguments: dict[str, Any] | None
    image_size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    classes: tuple[str, ...] | None = None  # a name for each row of the classifier
    source: str = ""
    origin: dict[str, Any] = field(default_factory=dict)  # task, step, weights, and the sets that these were trained on
    text: Text | None = None
    scored_as: tuple[str, str] = ("", "")  # how evaluations of a run call this checkpoint and these weights

    def build(self) -> InternImage:
        """The model with these weights, the same tensors where they are float32, in evaluation mode.

        Raises UserError where its arguments are unknown or do not fit.
        """
        if self.arguments is None:
            raise UserError(
                f"{self.source}: does not say which InternImage it is, and its shapes are no published one's"
            )
        with torch.device("meta"):
            model = create_model("custom", **self.arguments)
        state = {k: v.float() if v.is_floating_point() else v for k, v in self.state.items()}
        official.load_state_dict(model, state, assign=True)
        return model.eval()

    def description(self) -> dict[str, Any]:
        """All but the weights, as JSON can hold it; the same for the same weights, wherever their run lies."""
        return {
            "arguments": self.arguments,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "classes": None if self.classes is None else list(self.classes),
            "origin": self.origin,
            "text": None if self.text is None else self.text.description(),
        }


def read_backbone(path: str | Path, which: str = "ema", choice: str = AUTO) -> Backbone:
    """The image encoder in `path`.

    Args:
        path: a run directory, a checkpoint, an exported file or folder (safetensors, .pth, timm's and Hugging Face's
            folders), or the authors' checkpoint.
        which: "ema" or "model", of a run, a checkpoint, or a file that holds both.
        choice: of a run's checkpoints: "best", "latest", the number of a step, or "auto", the best where there is one.

    Raises UserError where there is nothing to read, or no image encoder in it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run, checkpoint or weight file")
    if path.suffix in RUN_ONLY:
        raise UserError(
            f"{path}: a graph made for running, whose weights have lost their names; read the run, or an export to "
            "safetensors, official, timm, hf or open_clip"
        )
    return _from_run(path, which, choice) if is_run(path) else _from_file(path, which)


def load_backbone(
    model: nn.Module,
    path: str | Path,
    *,
    which: str = "ema",
    allow: Collection[str] = (),
    head_rows: Tensor | None = None,
) -> official.Listing:
    """Put the weights in `path` into an InternImage; strict: see official.load_state_dict, whose `allow` and
    `head_rows` these are.

    For another set of classes: `allow=("head.",)`; the model then keeps its own classifier, also where the file's has
    as many rows: what its rows mean, a number of classes does not say.
    """
    state = read_backbone(path, which).state
    if "head." in allow and head_rows is None:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    return official.load_state_dict(model, state, allow=allow, head_rows=head_rows)


def _from_run(path: Path, which: str, choice: str) -> Backbone:
    checkpoint = find_checkpoint(path, choice)
    config, trained_on = checkpoint.config, checkpoint.trained_on
    weights = checkpoint.load(which, (IMAGE_PREFIX, TEXT_PREFIX, SCALE, BIAS))
    image = {name.removeprefix(IMAGE_PREFIX): value for name, value in weights.items() if name.startswith(IMAGE_PREFIX)}
    if not image:
        raise UserError(f"{path}: its {which!r} weights hold no image encoder (no entry begins with {IMAGE_PREFIX!r})")
    with torch.device("meta"):
        model = image_of(module_of(config, classes=task_of(config).classes_of(checkpoint.outline())))
    expected = model.state_dict()
    if differing := sorted(set(image) ^ set(expected)):
        raise UserError(f"{path}: the image encoder does not fit its configuration: {first_ten(differing)}")
    model.load_state_dict(image, assign=True)
    data, task = config.data, config.task.model_dump(mode="json")
    return Backbone(
        {
            key: value.float() if value.is_floating_point() else value
            for key, value in official.state_dict(model).items()
        },
        model.arguments,
        image_size=data.image_size,
        mean=tuple(data.mean),
        std=tuple(data.std),
        classes=row_names(trained_on.classes, model.num_classes),
        source=f"{path.name}, {checkpoint.title}, {checkpoint.weights_title(which)}",
        origin={
            "task": task,
            "step": checkpoint.step,
            "images": checkpoint.samples,
            "weights": checkpoint.weights_title(which),
            "sources": [without_path(source) for source in trained_on.as_json()["sources"]],
            "started_from": None if config.initialize_from is None else Path(config.initialize_from).name,
        },
        scored_as=(checkpoint.title, checkpoint.weights_title(which)),
        text=text_of(weights, task["text"]) if isinstance(task.get("text"), dict) else None,
    )


def without_path(source: dict[str, Any]) -> dict[str, Any]:
    """Where a set lay is nobody's business elsewhere."""
    return {key: value for key, value in source.items() if key != "path"}


def _from_file(path: Path, which: str) -> Backbone:
    file = open_weights(path, which)
    wrapper = official.wrapper_of(file.state)
    state = official.normalize_layout(file.state)
    under = f"entries under {wrapper!r} ({len(state)} of {len(file.state)})" if wrapper else ""
    source = ", ".join(fact for fact in (path.name, file.chosen, under) if fact)
    described = _description(path, file.described)
    if described is not None:
        return Backbone(
            _official_keys(state, described["arguments"], path),
            described["arguments"],
            image_size=described["image_size"],
            mean=tuple(described.get("mean", IMAGENET_MEAN)),
            std=tuple(described.get("std", IMAGENET_STD)),
            classes=None if described.get("classes") is None else tuple(described["classes"]),
            source=source,
            origin=described.get("origin", {}),
            text=_text(file.state, described.get("text")),
        )
    name = published_variant(state)
    if name is None:
        return Backbone(state, None, source=source)
    variant = VARIANTS[name]
    arguments = {**variant.arguments, "num_classes": state["head.bias"].shape[0] if "head.bias" in state else 0}
    return Backbone(state, arguments, image_size=variant.image_size, source=source)


def _text(state: dict[str, Tensor], sizes: dict[str, Any] | None) -> Text | None:
    """The text tower in the folders that hold it, those of transformers and open_clip."""
    tower = {key.removeprefix(TEXT_PREFIX): value for key, value in state.items() if key.startswith(TEXT_PREFIX)}
    if not tower or not sizes:
        return None
    bias = float(state["logit_bias"]) if "logit_bias" in state else None
    return Text(tower, sizes["heads"], float(state["logit_scale"]), bias)


def _official_keys(state: dict[str, Tensor], arguments: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """timm's and Hugging Face's folders hold our own names: the same weights under the official keys."""
    if "stem.conv1.weight" not in state:
        return state
    with torch.device("meta"):
        model = create_model("custom", **arguments)
    if differing := sorted(set(state) ^ set(model.state_dict())):
        raise UserError(f"{path}: its weights do not fit what it says of itself; differing are {first_ten(differing)}")
    model.load_state_dict(state, assign=True)
    return official.state_dict(model)


def published_variant(state: dict[str, Tensor]) -> str | None:
    """The published model whose official keys and shapes (but the classifier's rows) these are."""
    for name in VARIANTS:
        with torch.device("meta"):
            expected = official.state_dict(create_model(name))
        if all(
            key in state and state[key].shape == v.shape for key, v in expected.items() if not key.startswith("head.")
        ):
            return name
    return None


def _description(path: Path, own: dict[str, Any] | None) -> dict[str, Any] | None:
    """What an export of ours says of itself: in the file (`own`), or in the folder's config.json and internimage.json.

    transformers and timm write the first anew where they save a model again, and leave the other behind.
    """
    if path.is_dir():
        beside, config = _json(path / "internimage.json"), _json(path / "config.json")
        if config.get("model_type") == "internimage":
            return beside | _from_transformers(config)
        if config.get("architecture") in VARIANTS:
            return beside | _from_timm(config)
        if beside:
            return beside
    return own


def _from_transformers(config: dict[str, Any]) -> dict[str, Any]:
    names = tuple(name for _, name in sorted(config.get("id2label", {}).items(), key=lambda entry: int(entry[0])))
    nameless = names == tuple(f"LABEL_{row}" for row in range(len(names)))
    found = {
        "arguments": {**config["arguments"], "num_classes": len(names) or config["arguments"].get("num_classes", 0)},
        "image_size": config.get("image_size", 224),
        "mean": config.get("image_mean"),
        "std": config.get("image_std"),
        "classes": None if nameless else names,
        "origin": config.get("origin"),
        "text": config.get("text"),
    }
    return {key: value for key, value in found.items() if value is not None or key == "classes"}


def _from_timm(config: dict[str, Any]) -> dict[str, Any]:
    fed = config.get("pretrained_cfg", {})
    arguments = {**VARIANTS[config["architecture"]].arguments, **config.get("model_args", {})}
    return {
        "arguments": {**arguments, "num_classes": config["num_classes"], "in_chans": fed["input_size"][0]},
        "image_size": fed["input_size"][-1],
        "mean": fed["mean"],
        "std": fed["std"],
        "classes": fed.get("label_names"),
    }


def _json(path: Path) -> dict[str, Any]:
    """An object in a file; empty where there is no such file. Raises UserError where it is not JSON."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}
