"""Heads in fp32 over an image model in half precision: boxes and anchors do not fit into bf16, which rounds 512 px to
4 px.

A head's parameters are cast with the whole module; its layers cast them back where they read them, so that ZeRO may
gather them in the hooks of the layer's call.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers import GlobalBatchNorm

__all__ = ["GlobalBatchNorm2d", "compute_in_fp32"]


def exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _exact_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else exact(x)


class _Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(exact(input), exact(self.weight), _exact_or_none(self.bias))
        return out


class _ConvTranspose2d(nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        stride, padding, extra, dilation = (
            cast(tuple[int, int], pair) for pair in (self.stride, self.padding, self.output_padding, self.dilation)
        )
        weight, bias = exact(self.weight), _exact_or_none(self.bias)
        return F.conv_transpose2d(exact(input), weight, bias, stride, padding, extra, self.groups, dilation)


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(exact(input), exact(self.weight), _exact_or_none(self.bias))


class _LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _exact_or_none(self.weight), _exact_or_none(self.bias)
        return F.layer_norm(exact(input), self.normalized_shape, weight, bias, self.eps)


class _GroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _exact_or_none(self.weight), _exact_or_none(self.bias)
        return F.group_norm(exact(input), self.num_groups, weight, bias, self.eps)


class _Embedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return exact(super().forward(input))


class _MultiheadAttention(nn.MultiheadAttention):
    """The one form that Mask2Former's decoder calls: sequence first, one projection for query, key and value."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return F.multi_head_attention_forward(
            exact(query),
            exact(key),
            exact(value),
            self.embed_dim,
            self.num_heads,
            _exact_or_none(self.in_proj_weight),
            _exact_or_none(self.in_proj_bias),
            None,
            None,
            False,
            self.dropout,
            exact(self.out_proj.weight),
            _exact_or_none(self.out_proj.bias),
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=False,
            attn_mask=attn_mask,
        )


class GlobalBatchNorm2d(GlobalBatchNorm):
    """GlobalBatchNorm of maps [B, C, H, W]: the statistics of the joined batch of all ranks, in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: _Conv2d,
    nn.ConvTranspose2d: _ConvTranspose2d,
    nn.Linear: _Linear,
    nn.LayerNorm: _LayerNorm,
    nn.GroupNorm: _GroupNorm,
    nn.Embedding: _Embedding,
    nn.MultiheadAttention: _MultiheadAttention,
}


def compute_in_fp32(head: nn.Module) -> None:
    """Makes every layer of a head compute in fp32, in place, and its BatchNorms those of all ranks.

    A layer changes its class and stays the same object: some heads of transformers hold their layers in plain lists,
    too.
    """
    for layer in list(head.modules()):
        if type(layer) is nn.BatchNorm2d:
            _globalize(layer)
        elif type(layer) in _LAYERS:
            layer.__class__ = _LAYERS[type(layer)]


def _globalize(norm: nn.BatchNorm2d) -> None:
    momentum = 0.1 if norm.momentum is None else norm.momentum
    fresh = GlobalBatchNorm2d(norm.num_features, eps=norm.eps, momentum=momentum)
    fresh._parameters.update(norm._parameters)
    fresh._buffers.update(norm._buffers)
    norm.__class__ = GlobalBatchNorm2d  # type: ignore[assignment]
    norm.__dict__.update(fresh.__dict__)
