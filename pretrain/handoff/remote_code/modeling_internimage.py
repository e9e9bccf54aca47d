"""InternImage for transformers: the encoder, and the encoder with its classifier."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from .configuration_internimage import InternImageConfig
from .internimage_internimage import InternImage


class InternImagePreTrainedModel(PreTrainedModel):
    config_class = InternImageConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = False

    def __init__(self, config):
        super().__init__(config)
        self.model = InternImage(**config.arguments)
        self.post_init()

    def _init_weights(self, module):
        """InternImage initialises itself."""


class InternImageModel(InternImagePreTrainedModel):
    """pixel_values [B, C, S, S] -> last_hidden_state [B, D, H, W], and pooler_output, the vector a classifier reads."""

    def forward(self, pixel_values, return_dict=True, **ignored):
        features = self.model.forward_features(pixel_values)
        pooled = self.model.forward_head(features, pre_logits=True)
        if not return_dict:
            return features, pooled
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=pooled)


class InternImageForImageClassification(InternImagePreTrainedModel):
    """pixel_values [B, C, S, S] -> logits [B, classes]; with labels [B] also the cross-entropy."""

    def forward(self, pixel_values, labels: torch.Tensor | None = None, return_dict=True, **ignored):
        logits = self.model(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)
