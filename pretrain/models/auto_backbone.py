"""InternImage as a backbone of transformers' detectors and segmenters; importing this module registers it.

    config = InternImageBackboneConfig(arguments=dict(channels=64, depths=[4, 4, 18, 4], groups=[4, 8, 16, 32]))
    Mask2FormerConfig(backbone_config=config)            # or AutoBackbone.from_config(config)

Needs the extra `hf`. timm's `features_only` is the way for what takes timm's models (timm_registration).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoBackbone, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from pretrain.models.internimage import InternImage
from pretrain.models.variants import VARIANTS

STAGES = ("stage1", "stage2", "stage3", "stage4")


class InternImageBackboneConfig(BackboneConfigMixin, PretrainedConfig):  # type: ignore[misc]
    """arguments: of InternImage; a drop path and own widths among them. variant: a published one's, which `arguments`
    change. out_features or out_indices: stages whose maps are given out, by default the last.
    """

    model_type = "internimage_backbone"

    def __init__(
        self,
        arguments: Mapping[str, Any] | None = None,
        variant: str | None = None,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        published = dict(VARIANTS[variant].arguments) if variant is not None else {}
        self.arguments = {**published, **(arguments or {})}
        self.depths = list(self.arguments.get("depths", (4, 4, 18, 4)))
        self.stage_names = list(STAGES)
        features = None if out_features is None else list(out_features)
        indices = None if out_indices is None else list(out_indices)
        self.set_output_features_output_indices(out_features=features, out_indices=indices)


class InternImageBackbone(BackboneMixin, PreTrainedModel):  # type: ignore[misc]
    """pixel_values [B, C, H, W] -> feature_maps of the chosen stages [B, C, H', W'], strides 4 to 32; where asked for,
    `hidden_states` of all four.
    """

    config_class = InternImageBackboneConfig
    base_model_prefix = "image"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    has_attentions = False

    def __init__(self, config: InternImageBackboneConfig) -> None:
        super().__init__(config)
        self.image = InternImage(**{**config.arguments, "num_classes": 0})
        self.num_features = [self.image.channels * 2**stage for stage in range(4)]
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        stages = [stage.permute(0, 3, 1, 2) for stage in self.image.forward_stages(pixel_values)]
        chosen = tuple(stages[STAGES.index(name)] for name in self.out_features)
        hidden = tuple(stages) if output_hidden_states else None
        out = BackboneOutput(feature_maps=chosen, hidden_states=hidden)  # type: ignore[arg-type]
        return out.to_tuple() if return_dict is False else out

    def _set_gradient_checkpointing(self, enable: bool = True, *ignored: Any, **options: Any) -> None:
        self.image.set_grad_checkpointing(enable)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """InternImage initialises itself."""


AutoConfig.register("internimage_backbone", InternImageBackboneConfig)
AutoBackbone.register(InternImageBackboneConfig, InternImageBackbone)
