"""The seven published InternImages, as arguments of `InternImage`. Imports no torch.

Table 1 of "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions" (Wang et al., CVPR
2023) and the settings of the released classifiers.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One published model and what its authors state of it.

    `arguments` are those of `InternImage`; `parameters` is in millions, `flops` in units of 10^9 multiply-adds at
    `image_size`, both rounded as published.
    """

    arguments: dict[str, Any]
    parameters: float
    flops: float
    image_size: int
    top1: float


def _huge(channels: int, depths: tuple[int, ...], groups: tuple[int, ...], **arguments: Any) -> dict[str, Any]:
    """What H and G have in common: a norm after every sixth block of the third stage, centre scaling, the CLIP head."""
    return {
        "channels": channels,
        "depths": depths,
        "groups": groups,
        "dw_kernel_size": 5,
        "use_clip_projector": True,
        "level2_post_norm": True,
        "level2_post_norm_block_ids": tuple(range(5, depths[2], 6)),
        "center_feature_scale": True,
        **arguments,
    }


def _small(channels: int, depths: tuple[int, ...], drop_path_rate: float, **arguments: Any) -> dict[str, Any]:
    groups = tuple(channels * 2**stage // 16 for stage in range(4))
    return {"channels": channels, "depths": depths, "groups": groups, "drop_path_rate": drop_path_rate, **arguments}


_SCALED: dict[str, Any] = {"layer_scale": 1e-5, "post_norm": True}

VARIANTS: dict[str, Variant] = {
    "internimage_t": Variant(_small(64, (4, 4, 18, 4), 0.1), 29.92, 5, 224, 83.5),
    "internimage_s": Variant(_small(80, (4, 4, 21, 4), 0.4, **_SCALED), 50.08, 8, 224, 84.2),
    "internimage_b": Variant(_small(112, (4, 4, 21, 4), 0.5, **_SCALED), 97.46, 16, 224, 84.9),
    "internimage_l": Variant(_small(160, (5, 5, 22, 5), 0.1, offset_scale=2.0, **_SCALED), 223.3, 108, 384, 87.7),
    "internimage_xl": Variant(_small(192, (5, 5, 24, 5), 0.2, offset_scale=2.0, **_SCALED), 334.8, 163, 384, 88.0),
    "internimage_h": Variant(
        _huge(320, (6, 6, 32, 6), (10, 20, 40, 80), drop_path_rate=0.2, res_post_norm=True), 1089.6, 1478, 640, 89.6
    ),
    "internimage_g": Variant(
        _huge(512, (2, 2, 48, 4), (16, 32, 64, 128), drop_path_rate=0.4, post_norm=True), 3076, 2700, 512, 90.1
    ),
}
