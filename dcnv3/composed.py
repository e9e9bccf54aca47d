"""What the kernels compute, composed of PyTorch's own operators: any device, any derivative, and it can be exported.

`fused` falls back on the layers here, and defines no formula of its own. A folder that is handed on carries this file,
whole, in the place of `fused` and `operator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from dcnv3.geometry import Geometry, check_tensors, make_geometry
from dcnv3.reference import dcnv3_reference, packed_reference

# those of `fused`
LAYERS = ("NormGelu", "gelu", "gelu_", "joined_linears", "layer_norm", "norm_gelu", "residual_norm", "split_norm")


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the last dimension. x: [..., C], weight, bias: [C] -> [..., C]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def norm_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """gelu(layer_norm(x))."""
    return F.gelu(layer_norm(x, weight, bias, eps))


def split_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, readers: int = 1
) -> tuple[torch.Tensor, ...]:
    """layer_norm(x) for each reader, and x."""
    return (*[layer_norm(x, weight, bias, eps)] * readers, x)


def residual_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """residual + factor * layer_norm(x)."""
    normal = layer_norm(x, weight, bias, eps)
    return residual + normal if factor is None else torch.addcmul(residual, normal, factor)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The exact GELU, by the error function. [...] -> [...]."""
    return F.gelu(x)


def gelu_(x: torch.Tensor) -> torch.Tensor:
    """`gelu` in x's own memory, where no gradient is wanted. [...] -> x."""
    return x.copy_(F.gelu(x))


def joined_linears(
    weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One weight and one bias of several linear layers. [P1, C], [P2, C], ...; [P1], [P2], ... -> [P, C], [P]."""
    return torch.cat(tuple(weights)), torch.cat(tuple(biases))


class NormGelu(torch.nn.LayerNorm):
    """LayerNorm over the last dimension, then GELU: [..., C] -> [..., C]."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return norm_gelu(x, self.weight, self.bias, self.eps)


def dcnv3(
    value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, *, backend: str | None = None, **options: Any
) -> torch.Tensor:
    """`dcnv3.dcnv3` by the reference, whatever `backend` says. options: those of `make_geometry`."""
    geometry = make_geometry(**options)
    check_tensors(value, offset, mask, geometry)
    return dcnv3_reference(value, offset, mask, geometry)


def packed_dcnv3(
    value: torch.Tensor, packed: torch.Tensor, geometry: Geometry, *, center: bool, backend: str | None = None
) -> torch.Tensor:
    """`dcnv3.operator.packed_dcnv3` by the reference, whatever `backend` says."""
    return packed_reference(value, packed, geometry, center)
