"""The code that an exported folder carries, so that it loads without this project: flat modules, relative imports."""

import re
from importlib import resources

from dcnv3.composed import LAYERS

_MODELS = (
    *("internimage", "heads", "layers", "linear", "randomness", "timm_features"),
    *("activations", "compilation", "recomputation", "variants"),
)
_SHARED = ("errors", "hashing")  # of data_pipeline
_OPERATOR = ("geometry", "reference", "module", "composed")
_WITHOUT_KERNELS = {"fused": "composed", "operator": "composed"}  # modules of dcnv3 that compiled code stands behind
_CHOICE = f'''"""The compiled layers where the dcnv3 package is installed, else the same in plain PyTorch."""

try:
    from dcnv3 import DCNv3, {", ".join(LAYERS)}
except ImportError:
    from .dcnv3_composed import {", ".join(LAYERS)}
    from .dcnv3_module import DCNv3

__all__ = {["DCNv3", *LAYERS]}
'''


def model_code() -> dict[str, str]:
    """File name -> text: internimage_internimage.py defines InternImage; it needs torch and timm alone."""
    models, operator = resources.files("pretrain.models"), resources.files("dcnv3")
    shared = resources.files("data_pipeline")
    files = {"internimage_dcnv3.py": _CHOICE}
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

    def carried(found: re.Match[str]) -> str:
        return f"from .dcnv3_{_WITHOUT_KERNELS.get(found[1], found[1])} import"

    return re.sub(r"^from dcnv3\.(\w+) import", carried, source, flags=re.MULTILINE)
