"""The code that an exported folder carries, so that it loads without this project: flat modules, relative imports."""

import re
from importlib import resources

_MODELS = (
    *("internimage", "heads", "layers", "linear", "randomness", "timm_features"),
    *("activations", "compilation", "recomputation", "variants"),
)
_SHARED = ("errors", "hashing")  # of data_pipeline
_OPERATOR = ("geometry", "reference", "module")
_CHOICE = '''"""The compiled layers where the dcnv3 package is installed, else the same in plain PyTorch."""

try:
    from dcnv3 import DCNv3, NormGelu, gelu, gelu_, layer_norm, norm_gelu, split_norm
except ImportError:
    from .dcnv3_fused import NormGelu, gelu, gelu_, layer_norm, norm_gelu, split_norm
    from .dcnv3_module import DCNv3

__all__ = ["DCNv3", "NormGelu", "gelu", "gelu_", "layer_norm", "norm_gelu", "split_norm"]
'''
_PLAIN_FUSED = '''"""LayerNorm and GELU in PyTorch's own operators."""

import torch
from torch.nn import functional as F


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def norm_gelu(x, weight, bias, eps):
    return F.gelu(layer_norm(x, weight, bias, eps))


def split_norm(x, weight, bias, eps):
    return layer_norm(x, weight, bias, eps), x


def gelu(x):
    return F.gelu(x)


def gelu_(x):
    return x.copy_(F.gelu(x))


class NormGelu(torch.nn.LayerNorm):
    def __init__(self, channels, eps=1e-6):
        super().__init__(channels, eps=eps)

    def forward(self, x):
        return norm_gelu(x, self.weight, self.bias, self.eps)
'''
_PLAIN_OPERATOR = '''"""The operator in plain PyTorch."""

from .dcnv3_geometry import check_tensors, make_geometry
from .dcnv3_reference import dcnv3_reference, packed_reference


def dcnv3(value, offset, mask, *, backend=None, **options):
    geometry = make_geometry(**options)
    check_tensors(value, offset, mask, geometry)
    return dcnv3_reference(value, offset, mask, geometry)


def packed_dcnv3(value, packed, geometry, *, center, backend=None):
    return packed_reference(value, packed, geometry, center)
'''


def model_code() -> dict[str, str]:
    """File name -> text: internimage_internimage.py defines InternImage; it needs torch and timm alone."""
    models, operator = resources.files("pretrain.models"), resources.files("dcnv3")
    shared = resources.files("data_pipeline")
    files = {"internimage_dcnv3.py": _CHOICE, "dcnv3_operator.py": _PLAIN_OPERATOR, "dcnv3_fused.py": _PLAIN_FUSED}
    for name in _SHARED:
        files[f"internimage_{name}.py"] = (shared / f"{name}.py").read_text(encoding="utf-8")
    for name in _MODELS:
        files[f"internimage_{name}.py"] = _relative((models / f"{name}.py").read_text(encoding="utf-8"))
    for name in _OPERATOR:
        files[f"dcnv3_{name}.py"] = _relative((operator / f"{name}.py").read_text(encoding="utf-8"))
    return files


def own_code(name: str) -> str:
    """A module that was written for the folder: pretrain/handoff/remote_code/NAME.py."""
    return (resources.files("pretrain.handoff") / "remote_code" / f"{name}.py").read_text(encoding="utf-8")


def _relative(source: str) -> str:
    source = re.sub(r"^from pretrain\.models\.(\w+) import", r"from .internimage_\1 import", source, flags=re.MULTILINE)
    source = re.sub(r"^from data_pipeline\.(\w+) import", r"from .internimage_\1 import", source, flags=re.MULTILINE)
    source = re.sub(r"^from dcnv3 import", "from .internimage_dcnv3 import", source, flags=re.MULTILINE)
    return re.sub(r"^from dcnv3\.(\w+) import", r"from .dcnv3_\1 import", source, flags=re.MULTILINE)
