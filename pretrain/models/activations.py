"""What InternImage keeps for the backward pass, in closed form, and what it should keep within a budget: no torch.

Values (not bytes) of one image, counted as this project's modules keep them; tests compare them with the tensors that
PyTorch really keeps. A block keeps everything, or its input and the outputs of some of its dear operations; the rest is
computed again in the backward pass. What a batch keeps however small it is, is not counted with an image: the joined
weights of the operators' products, for H 83 M values where no block is recomputed (`joined_weights`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Dear operations of a block: the MLP's two products, the operator's sampling, the depthwise convolution, the
# projections in and out of the operator, and the product that offsets and masks come from.
DEAR = ("fc1", "fc2", "sampling", "depthwise", "projection", "points")
Kept = tuple[str, ...]  # of a block whose input is kept too; () recomputes the whole block

# Values kept per pixel and channel of a block (pretrain.models.internimage.Block): its input, that of the value's
# projection, the value, depthwise convolution, its norm with GELU, the sampled map, the middle, the MLP's input, and
# twice its fourfold hidden layer. Without kernels for the norm with GELU (dcnv3.norm_gelu) one more is kept.
_BLOCK = 16.0
_LAYER_SCALE = _RES_POST_NORM = 2.0

# FLOP/s that each kind reaches in bf16 on one GPU of the H100's class, assumed: only their ratios matter here. Products
# run on tensor cores; the convolution and the sampling wait for memory.
_PRODUCT, _DEPTHWISE, _SAMPLING = 400e12, 3e12, 6e12


@dataclass(frozen=True)
class Activations:
    """Values kept (not bytes). `largest_block`: what recomputing one block needs for a moment."""

    kept: float
    largest_block: float = 0.0

    @property
    def peak(self) -> float:
        return self.kept + self.largest_block

    def __add__(self, other: "Activations") -> "Activations":
        return Activations(self.kept + other.kept, max(self.largest_block, other.largest_block))


@dataclass(frozen=True)
class Block:
    """One block of a stage, values of one image. outputs: by kind, (values, seconds that computing them takes)."""

    input: float
    whole: float
    joined: float  # weights that its operator's product joins
    outputs: dict[str, tuple[float, float]]

    def kept(self, kinds: Kept | None) -> float:
        """None: everything."""
        return self.whole if kinds is None else self.input + sum(self.outputs[kind][0] for kind in kinds)


def blocks_of(arguments: Mapping[str, Any], image_size: int) -> list[tuple[int, Block]]:
    """(depth, its block) of every stage of InternImage(**arguments)."""
    channels = int(arguments.get("channels", 64))
    depths: Sequence[int] = arguments.get("depths", (4, 4, 18, 4))
    groups: Sequence[int] = arguments.get("groups", (4, 8, 16, 32))
    kernel = int(arguments.get("kernel_size", 3))
    points = kernel**2 - bool(arguments.get("remove_center"))
    depthwise = int(arguments.get("dw_kernel_size") or kernel)
    ratio = float(arguments.get("mlp_ratio", 4.0))
    centre, unshared = bool(arguments.get("center_feature_scale")), not arguments.get("share_weights", True)
    res_post_norm = bool(arguments.get("res_post_norm")) and not arguments.get("post_norm")
    per_channel = _BLOCK + 2.0 * (ratio - 4.0)
    if arguments.get("layer_scale") is not None:
        per_channel += _LAYER_SCALE
    elif res_post_norm:
        per_channel += _RES_POST_NORM
    per_place = 3.0 + centre / points  # of a point and group: two offsets, a mask; of a group: the centre's share
    if unshared:  # every point's sampled map is kept apart; with the centre, before it is mixed in and after
        per_channel += (points - 1) * (1 + centre) + centre
        per_place += 1.0  # and the activated mask
    # A plain pre-norm block ends in a sum, for whose gradient the MLP's output is not needed; but before drop path's
    # factor is met again, the output is computed.
    scaled = arguments.get("layer_scale") is not None or bool(arguments.get("drop_path_rate"))
    ends_in_sum = not (scaled or res_post_norm or arguments.get("post_norm"))
    found = []
    for stage, (depth, count) in enumerate(zip(depths, groups, strict=True)):
        pixels, width = (image_size / 4 / 2**stage) ** 2, channels * 2**stage
        hidden = int(width * ratio)
        places = -(-(points * 3 + centre) * count // 8) * 8  # the product's width is padded

        def output(values: float, flops_a_value: float, speed: float, pixels: float = pixels) -> tuple[float, float]:
            return pixels * values, pixels * values * flops_a_value / speed

        outputs = {
            "fc1": output(hidden, 2 * width, _PRODUCT),
            "fc2": output(width, 0 if ends_in_sum else 2 * hidden, _PRODUCT),
            "sampling": output(width, 2 * 4 * points, _SAMPLING),
            "depthwise": output(width, 2 * depthwise**2, _DEPTHWISE),
            "projection": output(2 * width, 2 * width, _PRODUCT),
            "points": output(places, 2 * width, _PRODUCT),
        }
        whole = pixels * (per_channel * width + per_place * points * count)
        found.append((depth, Block(pixels * width, whole, float(places * width), outputs)))
    return found


def joined_weights(arguments: Mapping[str, Any]) -> float:
    """Values that InternImage(**arguments) keeps at most beside those of its images."""
    return sum(depth * block.joined for depth, block in blocks_of(arguments, 32))


def image_activations(
    arguments: Mapping[str, Any], image_size: int, *, checkpointing: bool = False, budget: float | None = None
) -> Activations:
    """Of one image through InternImage(**arguments).

    checkpointing: of its blocks, only the inputs are kept. budget: as in `kept_within`, in the place of that.
    """
    stages = blocks_of(arguments, image_size)
    if budget is None:
        kept: list[list[Kept | None]] = [[() if checkpointing else None] * depth for depth, _ in stages]
    else:
        kept = kept_within(budget, arguments, image_size)
    blocks = [(block, kinds) for (_, block), stage in zip(stages, kept, strict=True) for kinds in stage]
    inside = sum(block.kept(kinds) for block, kinds in blocks)
    again = max((block.whole for block, kinds in blocks if kinds is not None), default=0.0)
    return Activations(_outside_blocks(arguments, image_size, stages) + inside, again)


def kept_within(budget: float, arguments: Mapping[str, Any], image_size: int) -> list[list[Kept | None]]:
    """What each block of each stage keeps so that the peak of `image_activations` is at most `budget` values an image.

    First what is dearest to compute for its size, then whole blocks. Raises ValueError where not even the blocks'
    inputs fit, and for weights that are not shared, whose blocks are of another make.
    """
    stages = blocks_of(arguments, image_size)
    outside = _outside_blocks(arguments, image_size, stages)
    if outside + sum(depth * block.whole for depth, block in stages) <= budget:
        return [[None] * depth for depth, _ in stages]
    if not arguments.get("share_weights", True):
        raise ValueError("share_weights=False: a budget is for blocks that share the operator's weights")
    least = outside + sum(depth * block.input for depth, block in stages) + max(block.whole for _, block in stages)
    if budget < least:
        raise ValueError(f"a budget of {budget:.0f} values an image: with every block recomputed it is {least:.0f}")
    room = budget - least
    counts: dict[tuple[int, str], int] = {}
    options = [(stage, kind, *block.outputs[kind]) for stage, (_, block) in enumerate(stages) for kind in DEAR]
    for stage, kind, values, seconds in sorted(options, key=lambda option: -option[3] / option[2]):
        fitting = min(stages[stage][0], int(room / values)) if seconds else 0
        counts[stage, kind] = fitting
        room -= fitting * values
    kept: list[list[Kept | None]] = []
    for stage, (depth, block) in enumerate(stages):
        dear: list[Kept] = [tuple(kind for kind in DEAR if counts[stage, kind] > index) for index in range(depth)]
        rest = block.whole - block.kept(dear[0])  # the first block of a stage keeps the most
        whole = min(sum(kinds == dear[0] for kinds in dear), int(room / rest)) if _complete(dear[0], block) else 0
        room -= whole * rest
        kept.append([None if index < whole else kinds for index, kinds in enumerate(dear)])
    return kept


def _complete(kinds: Kept, block: Block) -> bool:
    return all(kind in kinds for kind, (_, seconds) in block.outputs.items() if seconds)


def _outside_blocks(arguments: Mapping[str, Any], image_size: int, stages: Sequence[tuple[int, Block]]) -> float:
    channels = int(arguments.get("channels", 64))
    side = image_size / 2
    kept = 3.0 * image_size**2 + 2.0 * side**2 * channels / 2  # the stem
    kept += stages[0][1].input
    for _, block in stages[:-1]:
        kept += block.input * 1.5  # the way down: its input, and its norm's
    if arguments.get("center_feature_scale") or not arguments.get("post_norm"):
        kept += sum(block.input for _, block in stages)  # what a stage's norm is given
    if arguments.get("level2_post_norm"):
        kept += len(arguments.get("level2_post_norm_block_ids") or ()) * stages[2][1].input
    if arguments.get("use_clip_projector"):
        return kept + 2.0 * (image_size / 16) ** 2 * float(arguments.get("clip_embed_dim", 1024))
    return kept + 3.0 * stages[-1][1].input * 1.5
