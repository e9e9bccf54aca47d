"""What a GPU kernel is for, told from its name: tables of a trace can then speak of products and norms."""

from __future__ import annotations

import re

# The first pattern that a kernel's name matches says its kind: names of libraries first, then what an elementwise
# kernel of PyTorch computes, which stands in its template arguments.
KINDS = (
    ("dcnv3 backward", r"dcnv3\S*backward|dcnv3\S*(tile|finish|bound)_kernel|\b_backward_kernel"),
    ("dcnv3 forward", r"dcnv3\S*forward|\b_forward_kernel"),
    ("compiled", r"^triton_"),
    ("depthwise convolution", r"2d_c1_k1_nhwc|[Dd]epthwise"),
    ("other convolution", r"implicit_gemm|implicit_convolve|xmma_(fprop|dgrad|wgrad)|fprop|nhwcAddPadding|nchwToNhwc"),
    ("matrix product", r"nvjet|gemm|cutlass|splitKreduce|cublas"),
    ("attention", r"flash|fmha|attention"),
    ("layer norm", r"layer_norm|GammaBeta|LayerNorm"),
    ("optimizer", r"multi_tensor_apply|FusedOptimizer|[Aa]dam"),
    ("GELU", r"[Gg]elu"),
    ("softmax and loss", r"[Ss]oft[Mm]ax|nll_loss|cross_entropy"),
    ("reduction", r"reduce_kernel"),
    ("copy", r"Memcpy|memcpy|copy_kernel|direct_copy|CatArray|bfloat16tofloat"),
    ("fill", r"Memset|FillFunctor"),
    ("random numbers", r"shift_kernel|Bitwise|remainder|distribution|philox"),
    ("addition", r"CUDAFunctor_add|addcmul|lerp"),
    ("product of elements", r"MulFunctor"),
    ("other elementwise", r"elementwise_kernel"),
    ("communication", r"nccl"),
)


def kind(name: str) -> str:
    """The kind of the kernel of this name; "other" where no pattern knows it."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def short(name: str) -> str:
    """A kernel's name without return type, namespaces and template arguments, after its kind where that says more."""
    bare = re.sub(r"\(anonymous namespace\)::", "", name).removeprefix("void ").partition("<")[0].partition("(")[0]
    bare = (bare.rpartition("::")[2] or name)[:40]
    return f"{kind(name)} ({bare})"
