"""What each preset's paper does to a view: keys of `data.augmentation`, for what a configuration leaves out."""

from typing import Any

# BYOL, table 6. MoCo v3 takes these over, and so does SiameseIM's code (with crops of a fifth and more).
_BYOL = {
    "scale": (0.08, 1.0),
    "color_jitter": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "jitter": 0.8,
    "grey": 0.2,
    "blur": (1.0, 0.1),
    "solarize": (0.0, 0.2),
}
_SIAMESE = {**_BYOL, "scale": (0.2, 1.0)}
_CLIP = {"scale": (0.9, 1.0), "flip": 0.0}  # open_clip's crops; CLIP (section 2.5) crops alone

AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "m3i": _SIAMESE,  # our choice: the paper says "augmented views"
    "siamese": _SIAMESE,
    "data2vec": {"scale": (0.2, 1.0), "color_jitter": 0.4},  # BEiT's, which data2vec takes over
    "byol": _BYOL,
    "moco": _BYOL,
    "simclr": {  # SimCLR, appendix A, strength 1
        "scale": (0.08, 1.0),
        "color_jitter": 0.8,
        "hue": 0.2,
        "jitter": 0.8,
        "grey": 0.2,
        "blur": 0.5,
    },
    "simsiam": {  # SimSiam, section 3: those of MoCo v2
        "scale": (0.2, 1.0),
        "color_jitter": 0.4,
        "hue": 0.1,
        "jitter": 0.8,
        "grey": 0.2,
        "blur": 0.5,
    },
    "simmim": {"scale": (0.67, 1.0)},  # SimMIM, section 4.1
    "clip": _CLIP,
    "siglip": _CLIP,
    "clip_category": _CLIP,
}
