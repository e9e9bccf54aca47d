"""DCNv3, the deformable convolution of InternImage, usable alone: `from dcnv3 import DCNv3`.

geometry    sizes, point order, checks          reference   the definition, in plain PyTorch
operator    `dcnv3`, the function               module      `DCNv3`, the layer
backends    what is available, and why not      csrc/       the CPU and CUDA kernels
fused       LayerNorm and GELU, joined layers   composed    the same in PyTorch's own operators
                                                triton_kernels   for GPUs where the CUDA kernels were not built
"""

from dcnv3.backends import available_backends, default_backend
from dcnv3.fused import (
    NormGelu,
    gelu,
    gelu_,
    joined_linears,
    layer_norm,
    norm_gelu,
    residual_norm,
    split_norm,
)
from dcnv3.module import DCNv3
from dcnv3.operator import dcnv3

__all__ = [
    "DCNv3",
    "NormGelu",
    "available_backends",
    "dcnv3",
    "default_backend",
    "gelu",
    "gelu_",
    "joined_linears",
    "layer_norm",
    "norm_gelu",
    "residual_norm",
    "split_norm",
]
