"""internimage_{t,s,b,l,xl,h,g} in timm's registry; importing pretrain.models does it.

import pretrain.models
timm.create_model("internimage_t", features_only=True)
timm.create_model("internimage_l.in22k", pretrained=True)           # the authors' weights from the Hugging Face Hub
timm.create_model("internimage_t", pretrained=True, pretrained_cfg_overlay={"file": "internimage_t_1k_224.pth"})
"""

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from data_pipeline.errors import UserError
from pretrain.models import official
from pretrain.models.internimage import InternImage
from pretrain.models.variants import VARIANTS


def _cfg(repository: str, size: int, num_classes: int = 1000) -> dict[str, Any]:
    clip_head = repository.startswith(("internimage_h", "internimage_g"))
    stride = 16 if clip_head else 32  # of what forward_features gives
    return {
        "hf_hub_id": f"OpenGVLab/{repository}",
        "input_size": (3, size, size),
        "pool_size": (size // stride, size // stride),
        "num_classes": num_classes,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv1",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2211.05778",
        "paper_name": "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions",
    }


# timm looks this name up in the module of the entry points. The first tag of a model is its default.
default_cfgs = generate_default_cfgs(
    {
        "internimage_t.in1k": _cfg("internimage_t_1k_224", 224),
        "internimage_s.in1k": _cfg("internimage_s_1k_224", 224),
        "internimage_b.in1k": _cfg("internimage_b_1k_224", 224),
        "internimage_l.in22k_ft_in1k": _cfg("internimage_l_22kto1k_384", 384),
        "internimage_l.in22k": _cfg("internimage_l_22k_384", 384, 21841),
        "internimage_xl.in22k_ft_in1k": _cfg("internimage_xl_22kto1k_384", 384),
        "internimage_xl.in22k": _cfg("internimage_xl_22k_384", 384, 21841),
        "internimage_h.joint427m_ft_in22k_in1k": _cfg("internimage_h_22kto1k_640", 640),
        "internimage_h.joint427m_ft_in22k": _cfg("internimage_h_jointto22k_384", 384, 21841),
        "internimage_g.joint427m_ft_in22k_in1k": _cfg("internimage_g_22kto1k_512", 512),
        "internimage_g.joint427m_ft_in22k": _cfg("internimage_g_jointto22k_384", 384, 21841),
    }
)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Any layout that `official` reads, or our own, under the names of `model`.

    timm stops being strict with `features_only` or another number of classes, and would then leave at random whatever a
    checkpoint lacks: so what is missing or unexpected outside the classifier is refused here. Shapes are passed on as
    they are: timm adapts the stem to another number of image channels, drops a classifier of another size, and names
    whatever else does not fit.

    Raises UserError that names the entries.
    """
    weights = official.unwrapped(state, official.wrapper_of(state))
    if "stem.conv1.weight" not in weights:
        state = official.normalize_layout(state)
        weights, listing = official.from_official(model, state)
        names = official.own_names(model)
        weights.update({names[key]: state[key] for key, _, _ in listing.reshaped})
        weights.update({key: state[key] for key in listing.unexpected})
    own = model.state_dict()
    misfits = official.Listing(
        [name for name in own if name not in weights and not name.startswith("head.")],
        [name for name in weights if name not in own and not name.startswith("head.")],
    )
    if str(misfits):
        raise UserError(
            f"the pretrained weights do not fit the model:\n{misfits}\nName the model that they are of "
            "(the arguments that differ from the published ones too), or remove the prefix that its entries carry."
        )
    return weights


def _register(name: str) -> None:
    def build(pretrained: bool = False, **arguments: Any) -> Any:
        return build_model_with_cfg(
            InternImage,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **{**VARIANTS[name].arguments, **arguments},
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name} as published; arguments are those of InternImage and of timm.create_model."
    entry: Callable[..., Any] = register_model(build)
    globals()[name] = entry


__all__: list[str] = []
for _name in VARIANTS:
    _register(_name)
