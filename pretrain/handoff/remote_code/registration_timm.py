"""InternImage for timm: importing this registers internimage_t to internimage_g. Needs torch and timm alone."""

from timm.models import build_model_with_cfg, register_model

from .internimage_internimage import InternImage
from .internimage_variants import VARIANTS


def _register(name):
    def build(pretrained=False, **arguments):
        return build_model_with_cfg(
            InternImage,
            name,
            pretrained,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **{**VARIANTS[name].arguments, **arguments},
        )

    build.__name__ = build.__qualname__ = name
    globals()[name] = register_model(build)


__all__ = []
for _name in VARIANTS:
    _register(_name)
