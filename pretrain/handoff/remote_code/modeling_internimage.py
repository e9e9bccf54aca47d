"""InternImage for transformers: the encoder, with a text tower where it was trained with one, and the classifier."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, __version__
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import ModelOutput

try:
    from transformers.backbone_utils import BackboneMixin
except ImportError:  # transformers before 5, where the folder has no AutoBackbone

    class BackboneMixin:  # type: ignore[no-redef]
        pass


from .configuration_internimage import InternImageConfig
from .internimage_internimage import InternImage
from .text_internimage import TextTower

FEATURES_IN_AN_OUTPUT = int(__version__.partition(".")[0]) >= 5  # get_*_features gave a tensor before


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


@dataclass
class InternImageZeroShotOutput(ModelOutput):
    """logits_per_image: [images, texts], cosines times the learnt scale (plus a bias, where the loss was a
    sigmoid's). image_embeds, text_embeds: unit vectors."""

    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None


class InternImageModel(InternImagePreTrainedModel):
    """pixel_values [B, C, S, S] -> last_hidden_state [B, D, H, W], and pooler_output, the vector a classifier reads.

    With input_ids [N, L] as well, and a text tower: the similarity of every picture and text.
    """

    def __init__(self, config):
        super().__init__(config)
        self.text, self.logit_scale, self.logit_bias = None, None, None
        if config.text:
            self.text = TextTower(**config.text)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if config.text and config.sigmoid:
            self.logit_bias = nn.Parameter(torch.tensor(0.0))

    def forward(self, pixel_values, input_ids=None, output_hidden_states=None, return_dict=True, **ignored):
        if input_ids is not None:
            output = self._similarity(pixel_values, input_ids)
            return output if return_dict else output.to_tuple()
        features, stages = self._features(pixel_values, output_hidden_states)
        output = BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=self.model.forward_head(features, pre_logits=True),
            hidden_states=stages,
        )
        return output if return_dict else output.to_tuple()

    def get_image_features(self, pixel_values, **ignored):
        """The pooled vectors that meet the text, [B, E], not normalised."""
        self._towers()
        fused = self.model.forward_fused(pixel_values).flatten(1, 2)
        pooled = self.model.clip_projector(fused)
        return _features_output(fused, pooled)

    def get_text_features(self, input_ids, **ignored):
        """The pooled vectors of the texts, [B, E], not normalised."""
        self._towers()
        return _features_output(None, self.text(input_ids))

    def _towers(self):
        if self.text is None:
            raise ValueError("this InternImage was trained without texts, so pictures and texts cannot be compared")

    def _similarity(self, pixel_values, input_ids):
        self._towers()
        images, texts = _pooled(self.get_image_features(pixel_values)), _pooled(self.get_text_features(input_ids))
        images, texts = nn.functional.normalize(images, dim=-1), nn.functional.normalize(texts, dim=-1)
        logits = self.logit_scale.exp() * images @ texts.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return InternImageZeroShotOutput(logits, logits.T, images, texts)


def _features_output(tokens, pooled):
    if FEATURES_IN_AN_OUTPUT:
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)
    return pooled


def _pooled(features):
    return features.pooler_output if FEATURES_IN_AN_OUTPUT else features


class InternImageForImageClassification(InternImagePreTrainedModel):
    """pixel_values [B, C, S, S] -> logits [B, num_labels]; with labels [B] also the cross-entropy."""

    _keys_to_ignore_on_load_unexpected = [r"^text\.", r"^logit_scale$", r"^logit_bias$"]  # noqa: RUF012

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


class InternImageBackbone(BackboneMixin, InternImagePreTrainedModel):
    """pixel_values [B, C, H, W] -> feature_maps of the stages in config.out_features, [B, C, H', W'], strides 4 to 32;
    where asked for, hidden_states of all four. For detectors and segmenters, by AutoBackbone; transformers 5 or newer.
    """

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [r"^text\.", r"^logit_scale$", r"^logit_bias$"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.num_features = [self.model.channels * 2**stage for stage in range(4)]

    def forward(self, pixel_values, output_hidden_states=None, return_dict=None, **ignored):
        stages = tuple(stage.permute(0, 3, 1, 2) for stage in self.model.forward_stages(pixel_values))
        chosen = tuple(stages[self.stage_names.index(name)] for name in self.out_features)
        output = BackboneOutput(feature_maps=chosen, hidden_states=stages if output_hidden_states else None)
        return output.to_tuple() if return_dict is False else output
