"""InternImage for transformers: the encoder, and the encoder with its classifier."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutputWithNoAttention,
)

from .configuration_internimage import InternImageConfig
from .internimage_internimage import InternImage


class InternImagePreTrainedModel(PreTrainedModel):
    config_class = InternImageConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        config.arguments = {**config.arguments, "num_classes": config.num_labels}
        self.model = InternImage(**config.arguments)
        self.post_init()

    def _init_weights(self, module):
        """A new classifier, where the file has none or one of other classes; the rest initialises itself."""
        if module is self.model.head and isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.model.init_std or module.in_features**-0.5)
            nn.init.zeros_(module.bias)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None, **ignored):
        self.model.set_grad_checkpointing(enable)

    def _features(self, pixel_values, output_hidden_states):
        """The last map [B, D, H, W], and where asked for the four stages' maps, strides 4 to 32."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if not output_hidden_states:
            return self.model.forward_features(pixel_values), None
        last, stages = self.model.forward_intermediates(pixel_values)
        return last, tuple(stages)


class InternImageModel(InternImagePreTrainedModel):
    """pixel_values [B, C, S, S] -> last_hidden_state [B, D, H, W], and pooler_output, the vector a classifier reads."""

    def forward(self, pixel_values, output_hidden_states=None, return_dict=True, **ignored):
        features, stages = self._features(pixel_values, output_hidden_states)
        output = BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=self.model.forward_head(features, pre_logits=True),
            hidden_states=stages,
        )
        return output if return_dict else output.to_tuple()


class InternImageForImageClassification(InternImagePreTrainedModel):
    """pixel_values [B, C, S, S] -> logits [B, num_labels]; with labels [B] also the cross-entropy."""

    def __init__(self, config):
        if not config.num_labels:
            raise ValueError("this InternImage has no classifier: give num_labels=N for a new one, or use AutoModel")
        super().__init__(config)

    def forward(
        self,
        pixel_values,
        labels: torch.Tensor | None = None,
        output_hidden_states=None,
        return_dict=True,
        **ignored,
    ):
        features, stages = self._features(pixel_values, output_hidden_states)
        logits = self.model.forward_head(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        output = ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=stages)
        return output if return_dict else output.to_tuple()
