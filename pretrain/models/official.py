"""The released checkpoints' state dict, in and out, strict both ways.

    official.load_state_dict(model, official.read("internimage_t_1k_224.pth"))
    official.state_dict(model)                 # the same keys, shapes and bytes

Three layouts are read, under whatever prefix wrappers have put before their names: the classification checkpoints;
Hugging Face's, which calls gamma1 and gamma2 layer_scale1 and layer_scale2; and that of the 427M pretraining, whose
online backbone is `dcnv3.*`, whose momentum encoder is `mm_dcnv3*`, and whose category classifier stands under `clip.`.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from data_pipeline.errors import UserError, first_ten
from pretrain.models.reading import read_weights as read

__all__ = [
    "Listing",
    "from_official",
    "load_state_dict",
    "normalize_layout",
    "own_names",
    "read",
    "state_dict",
    "unwrapped",
    "wrapper_of",
]


@dataclass(frozen=True)
class _Entry:
    """Where an official tensor stands in our state dict."""

    name: str
    view: tuple[int, ...] | None = None  # dimensions that the official shape has more (1x1 convolutions)


@dataclass
class Listing:
    """What did not fit: names of the model's entries that got nothing, official keys that nothing took, (key, theirs,
    ours).
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def __str__(self) -> str:
        """At most ten lines a kind, the rest counted; "" where all fits."""
        kinds = (
            [f"missing: {name}" for name in self.missing],
            [f"unexpected: {name}" for name in self.unexpected],
            [
                f"shape: {name} is {list(theirs)} in the file, {list(ours)} in the model"
                for name, theirs, ours in self.reshaped
            ],
        )
        return "\n".join(first_ten(lines, "\n") for lines in kinds if lines)


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under the official keys and shapes, in the official order of kinds."""
    own = model.state_dict()
    result = {}
    for key, entry in _keys(model):
        value = own[entry.name]
        if entry.view is not None:
            value = value.reshape(*value.shape, *entry.view)
        result[key] = value
    return result


def from_official(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Listing]:
    """Official entries (any of the three layouts) under our names, and what does not fit `model`.

    Entries that do not fit are left out of the result; nothing is resized.
    """
    state = normalize_layout(state)
    own = model.state_dict()
    listing = Listing()
    result: dict[str, Tensor] = {}
    known = set()
    for key, entry in _keys(model):
        known.add(key)
        name = entry.name
        if key not in state:
            listing.missing.append(key)
            continue
        value, ours = state[key], own[name]
        shape = tuple(ours.shape)
        expected = (*shape, *entry.view) if entry.view is not None else shape
        if tuple(value.shape) != expected:
            listing.reshaped.append((key, tuple(value.shape), expected))
            continue
        result[name] = value.reshape(shape)
    listing.unexpected = [key for key in state if key not in known]
    return result, listing


def load_state_dict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow: Collection[str] = (),
    head_rows: Tensor | None = None,
    assign: bool = False,
) -> Listing:
    """Load official weights; whatever is missing, unexpected or misshapen is an error that names it.

    Args:
        allow: official keys, or prefixes ending in "." or "*", that may be missing, unexpected or misshapen; the model
            keeps its own values there. `allow=("head.",)` puts a new classifier on old weights.
        head_rows: int64 [num_classes], the rows of the file's classifier that make up the model's (a 21,841-way head
            becomes a 1,000-way one).
        assign: the model takes the tensors themselves, without a copy, as one on the meta device must.

    Returns what was allowed. Raises UserError for the rest.
    """
    state = dict(normalize_layout(state))
    if head_rows is not None:
        for key in ("head.weight", "head.bias"):
            if key not in state:
                raise UserError(f"head_rows was given, but the weights have no {key!r}")
            outside = head_rows[(head_rows < 0) | (head_rows >= state[key].shape[0])]
            if len(outside):
                raise UserError(
                    f"head_rows: {key!r} has {state[key].shape[0]} rows, row {int(outside[0])} was asked for"
                )
            state[key] = state[key][head_rows]
    weights, listing = from_official(model, state)
    refused = Listing(
        [key for key in listing.missing if not _allowed(key, allow)],
        [key for key in listing.unexpected if not _allowed(key, allow)],
        [item for item in listing.reshaped if not _allowed(item[0], allow)],
    )
    if str(refused):
        raise UserError(
            f"the weights do not fit the model:\n{refused}\n"
            "Build the model that the weights are of, or allow these entries by name (a new classifier: head.)."
        )
    model.load_state_dict(weights, strict=False, assign=assign)
    return listing


def own_names(model: nn.Module) -> dict[str, str]:
    """Official key -> the entry of the model that it belongs to."""
    return {key: entry.name for key, entry in _keys(model)}


def normalize_layout(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Any of the three layouts -> that of the classification checkpoints. Other keys stay, and count as unexpected;
    those outside the prefix of a wrapper are left out.
    """
    if isinstance(state.get("model"), Mapping):
        state = state["model"]
    state = unwrapped(state, wrapper_of(state))
    if any(key.startswith("dcnv3.levels.") for key in state):
        return dict(_from_pretraining(state))
    return {re.sub(r"\.layer_scale([12])$", r".gamma\1", key): value for key, value in state.items()}


def wrapper_of(state: Collection[str]) -> str:
    """What stands before the names of the image model: `module.`, `_orig_mod.`, `backbone.`, `image.`, or several.

    "" where they stand bare, or are not there. Raises UserError where there are several image models.
    """
    found = {
        key.removesuffix(first)
        for key in state
        for first in ("patch_embed.conv1.weight", "stem.conv1.weight")
        if key == first or key.endswith(f".{first}")
    }
    if "" in found:
        return ""
    # In the 427M layout the encoder is `dcnv3.`, beside its heads, and `mm_dcnv3.` the momentum copy of it.
    found = {
        prefix.removesuffix("dcnv3.") if f".{prefix}".endswith(".dcnv3.") else prefix
        for prefix in found
        if not f".{prefix}".endswith(".mm_dcnv3.")
    }
    if len(found) > 1:
        raise UserError(
            f"these are weights of {len(found)} image models, under {first_ten(sorted(found))}: keep those of one"
        )
    return next(iter(found), "")


def unwrapped(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _from_pretraining(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The 427M layout: the online image encoder and its category classifier; everything else is dropped at hand-off."""
    for key, value in state.items():
        if key.startswith("clip.classifier_ln."):
            yield "fc_norm.0." + key.removeprefix("clip.classifier_ln."), value
        elif key.startswith("clip.classifier."):
            yield "head." + key.removeprefix("clip.classifier."), value
        elif key.startswith("dcnv3."):
            yield key.removeprefix("dcnv3."), value
        elif key.startswith(("dcnv3_head_x3.", "dcnv3_head_x4.", "clip_projector.")):
            yield key, value


def _allowed(key: str, allow: Collection[str]) -> bool:
    return any(key == name or (name.endswith((".", "*")) and key.startswith(name.rstrip("*"))) for name in allow)


def _keys(model: Any) -> Iterator[tuple[str, _Entry]]:
    """(official key, our entry) for every entry of the model."""
    for name in ("conv1", "norm1", "conv2", "norm2"):
        yield from _pair(f"patch_embed.{name}" + (".1" if "norm" in name else ""), f"stem.{name}")
    for index, stage in enumerate(model.stages):
        yield from _stage(f"levels.{index}", f"stages.{index}", stage)
    if hasattr(model, "conv_head"):
        yield "conv_head.0.weight", _Entry("conv_head.proj.weight", view=(1, 1))
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            yield f"conv_head.1.0.{name}", _Entry(f"conv_head.norm.{name}")
    if hasattr(model, "clip_projector"):
        for theirs, ours in (("dcnv3_head_x4.0", "fuse.proj4"), ("dcnv3_head_x3", "fuse.proj3")):
            yield f"{theirs}.weight", _Entry(f"{ours}.weight", view=(1, 1))
            yield f"{theirs}.bias", _Entry(f"{ours}.bias")
        for part in ("q", "k", "v"):
            for name in ("weight", "bias"):
                yield f"clip_projector.norm1_{part}.0.{name}", _Entry(f"clip_projector.norm_{part}_{name}")
        for part in ("q", "k", "v"):
            yield f"clip_projector.cross_dcn.{part}_bias", _Entry(f"clip_projector.{part}_bias")
            yield f"clip_projector.cross_dcn.{part}.weight", _Entry(f"clip_projector.{part}_weight")
        yield from _pair("clip_projector.cross_dcn.proj", "clip_projector.proj")
        yield from _pair("fc_norm.0", "fc_norm")
    if isinstance(getattr(model, "head", None), nn.Linear):
        yield from _pair("head", "head")


def _stage(theirs: str, ours: str, stage: Any) -> Iterator[tuple[str, _Entry]]:
    for index, block in enumerate(stage.blocks):
        yield from _block(f"{theirs}.blocks.{index}", f"{ours}.blocks.{index}", block)
    if stage.norm is not None:
        yield from _pair(f"{theirs}.norm.0", f"{ours}.norm")
    for index in range(len(stage.post_norms)):
        yield from _pair(f"{theirs}.post_norms.{index}.0", f"{ours}.post_norms.{index}")
    if stage.downsample is not None:
        yield f"{theirs}.downsample.conv.weight", _Entry(f"{ours}.downsample.conv.weight")
        yield from _pair(f"{theirs}.downsample.norm.1", f"{ours}.downsample.norm")


def _block(theirs: str, ours: str, block: Any) -> Iterator[tuple[str, _Entry]]:
    if block.gamma1 is not None:
        yield f"{theirs}.gamma1", _Entry(f"{ours}.gamma1")
        yield f"{theirs}.gamma2", _Entry(f"{ours}.gamma2")
    yield from _pair(f"{theirs}.norm1.0", f"{ours}.norm1")
    if block.dcn.center_scale is not None:
        for name in ("weight", "bias"):
            yield f"{theirs}.dcn.center_feature_scale_proj_{name}", _Entry(f"{ours}.dcn.center_scale.{name}")
    yield from _pair(f"{theirs}.dcn.dw_conv.0", f"{ours}.dcn.depthwise")
    yield from _pair(f"{theirs}.dcn.dw_conv.1.1", f"{ours}.dcn.norm")
    yield from _pair(f"{theirs}.dcn.offset", f"{ours}.dcn.offset")
    yield from _pair(f"{theirs}.dcn.mask", f"{ours}.dcn.mask")
    yield from _pair(f"{theirs}.dcn.input_proj", f"{ours}.dcn.input_proj")
    yield from _pair(f"{theirs}.dcn.output_proj", f"{ours}.dcn.output_proj")
    yield from _pair(f"{theirs}.norm2.0", f"{ours}.norm2")
    yield from _pair(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1")
    yield from _pair(f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2")
    if block.res_norm1 is not None:
        yield from _pair(f"{theirs}.res_post_norm1.0", f"{ours}.res_norm1")
        yield from _pair(f"{theirs}.res_post_norm2.0", f"{ours}.res_norm2")


def _pair(theirs: str, ours: str) -> Iterator[tuple[str, _Entry]]:
    for name in ("weight", "bias"):
        yield f"{theirs}.{name}", _Entry(f"{ours}.{name}")
