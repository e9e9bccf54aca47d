"""The image encoder of a run, a checkpoint, or a weight file: its weights, and what is needed to build it again."""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from data_pipeline.errors import UserError
from pretrain.models import VARIANTS, InternImage, create_model, official
from pretrain.models.reading import INDEX_SUFFIX
from pretrain.tasks.module import image_of
from pretrain.tasks.task import module_of, task_of

METADATA_KEY = "internimage"  # of a safetensors file's own header: Backbone.description as JSON
IMAGE_PREFIX = "image."  # the encoder within a task's state dict


@dataclass
class Backbone:
    """Weights under the official keys, and how to build and feed the model.

    arguments: of InternImage; None where a foreign file does not say and its shapes fit no published variant.
    """

    state: dict[str, Tensor]
    arguments: dict[str, Any] | None
    image_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    classes: tuple[str, ...] | None = None
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def build(self) -> InternImage:
        """The model with these weights, in evaluation mode. UserError where its arguments are unknown or do not fit."""
        if self.arguments is None:
            raise UserError(
                f"{self.source}: does not say which InternImage it is, and its shapes are no published one's"
            )
        model = create_model("custom", **self.arguments)
        official.load_state_dict(model, self.state)
        return model.eval()

    def description(self) -> dict[str, Any]:
        """All but the weights, as JSON can hold it."""
        return {
            "arguments": self.arguments,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "classes": None if self.classes is None else list(self.classes),
            "source": self.source,
        }


def read_backbone(path: str | Path, which: str = "ema") -> Backbone:
    """The image encoder in `path`.

    Args:
        path: a run directory, a checkpoint, an exported file or folder (safetensors, .pth, timm's and Hugging Face's
            folders), or the authors' checkpoint.
        which: "ema" or "model", of a run or checkpoint.

    Raises UserError where there is nothing to read, or no image encoder in it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run, checkpoint or weight file")
    return _from_file(path) if _is_weight_file(path) else _from_run(path, which)


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

    For another set of classes: `allow=("head.",)`; the model then keeps its own classifier.
    """
    state = read_backbone(path, which).state
    if "head." in allow:
        own = official.state_dict(model)
        state = {k: v for k, v in state.items() if not k.startswith("head.") or (k in own and own[k].shape == v.shape)}
    return official.load_state_dict(model, state, allow=allow, head_rows=head_rows)


def _is_weight_file(path: Path) -> bool:
    if path.is_file():
        return True
    return any((path / name).is_file() for name in ("model.safetensors", "model" + INDEX_SUFFIX, "pytorch_model.bin"))


def _from_run(path: Path, which: str) -> Backbone:
    from pretrain.training.checkpoint.disk import load_weights

    weights, config = load_weights(path, which)
    image = {name.removeprefix(IMAGE_PREFIX): value for name, value in weights.items() if name.startswith(IMAGE_PREFIX)}
    if not image:
        raise UserError(f"{path}: its {which!r} weights hold no image encoder (no entry begins with {IMAGE_PREFIX!r})")
    with torch.device("meta"):
        model = image_of(module_of(config, classes=task_of(config).classes_of(weights)))
    expected = model.state_dict()
    differing = sorted(set(image) ^ set(expected))
    if differing:
        raise UserError(
            f"{path}: the image encoder does not fit its configuration; first differing entry: {differing[0]!r}"
        )
    model.load_state_dict(image, assign=True)
    data = config.data
    return Backbone(
        {
            key: value.float() if value.is_floating_point() else value
            for key, value in official.state_dict(model).items()
        },
        model.arguments,
        image_size=data.image_size,
        mean=tuple(data.mean),
        std=tuple(data.std),
        source=str(path.name),
    )


def _from_file(path: Path) -> Backbone:
    state = official.normalize_layout(official.read(path))
    described = _description(path)
    if described is not None:
        return Backbone(
            _official_keys(state, described["arguments"], path),
            described["arguments"],
            image_size=described["image_size"],
            mean=tuple(described["mean"]),
            std=tuple(described["std"]),
            classes=None if described.get("classes") is None else tuple(described["classes"]),
            source=path.name,
        )
    name = published_variant(state)
    if name is None:
        return Backbone(state, None, source=path.name)
    variant = VARIANTS[name]
    arguments = {**variant.arguments, "num_classes": state["head.bias"].shape[0] if "head.bias" in state else 0}
    return Backbone(state, arguments, image_size=variant.image_size, source=path.name)


def _official_keys(state: dict[str, Tensor], arguments: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """timm's and Hugging Face's folders hold our own names: the same weights under the official keys."""
    own = {name.removeprefix("model."): value for name, value in state.items()}
    if "stem.conv1.weight" not in own:
        return state
    with torch.device("meta"):
        model = create_model("custom", **arguments)
    differing = sorted(set(own) ^ set(model.state_dict()))
    if differing:
        raise UserError(
            f"{path}: its weights do not fit what it says of itself; first differing entry: {differing[0]!r}"
        )
    model.load_state_dict(own, assign=True)
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


def _description(path: Path) -> dict[str, Any] | None:
    """What an export of ours says of itself: in the file's header, or in the folder's internimage.json."""
    if path.is_dir():
        beside = path / "internimage.json"
        if beside.is_file():
            return json.loads(beside.read_text(encoding="utf-8"))
        path = path / "model.safetensors"
    if path.suffix == ".safetensors" and path.is_file():
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
        return json.loads(text) if text else None
    return None
