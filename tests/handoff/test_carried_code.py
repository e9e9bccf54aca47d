"""The code that exported folders carry: it is the package's own, whole, and computes the same without the package."""

import importlib
import inspect
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch

from dcnv3 import composed, fused, operator
from pretrain.handoff.carried import model_code
from pretrain.models import InternImage

SIZES = {"channels": 16, "depths": (1, 1, 1, 1), "groups": (2, 4, 8, 16), "num_classes": 3}
LIKE_H = {
    "dw_kernel_size": 5,
    "use_clip_projector": True,
    "clip_embed_dim": 32,
    "clip_heads": 2,
    "head_hidden_size": 24,
    "level2_post_norm": True,
    "level2_post_norm_block_ids": (0,),
    "res_post_norm": True,
    "center_feature_scale": True,
}


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder's module of the model, imported as a package where nothing of this project can be."""
    folder = tmp_path / "carried_internimage"
    folder.mkdir()
    for name, text in {**model_code(), "__init__.py": ""}.items():
        (folder / name).write_text(text)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        for name in list(sys.modules):
            if name.split(".")[0] in ("dcnv3", "pretrain", "data_pipeline"):
                patch.delitem(sys.modules, name)
        for name in ("dcnv3", "pretrain", "data_pipeline"):
            patch.setitem(sys.modules, name, None)
        yield importlib.import_module("carried_internimage.internimage_internimage")
        for name in [name for name in sys.modules if name.startswith("carried_internimage")]:
            del sys.modules[name]


def test_the_forms_without_kernels_are_one_file_copied_whole() -> None:
    own = (resources.files("dcnv3") / "composed.py").read_text(encoding="utf-8")
    copied = model_code()["dcnv3_composed.py"]
    assert copied == own.replace("from dcnv3.", "from .dcnv3_")
    assert not {"dcnv3_fused.py", "dcnv3_operator.py"} & set(model_code())


@pytest.mark.parametrize("name", composed.LAYERS)
def test_a_form_without_kernels_stands_for_the_layer(name: str) -> None:
    """Called alike, and the same values and gradients."""
    theirs, ours = getattr(composed, name), getattr(fused, name)
    assert inspect.signature(theirs) == inspect.signature(ours)
    torch.manual_seed(0)
    found = []
    for function in (theirs, ours):
        draw = torch.Generator().manual_seed(1)
        x, weight, bias = (torch.randn(shape, generator=draw) for shape in ((5, 7, 16), (16,), (16,)))
        if name == "gelu_":
            found.append([function(x), x])
            continue
        leaves = [x.requires_grad_()]
        if name == "joined_linears":
            leaves = [
                torch.randn(shape, generator=draw, requires_grad=True) for shape in ((2, 16), (3, 16), (2,), (3,))
            ]
            outputs = function(leaves[:2], leaves[2:])
        elif name == "NormGelu":
            layer = function(16)
            outputs = layer(x)
            leaves += layer.parameters()
        elif name == "gelu":
            outputs = function(x)
        else:
            leaves += [weight.requires_grad_(), bias.requires_grad_()]
            before = (x.square(), torch.linspace(0, 2, 5).view(5, 1, 1)) if name == "residual_norm" else ()
            outputs = function(x, *before, weight, bias, 1e-6)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs)
        found.append([*outputs, *torch.autograd.grad(total, leaves)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_the_layers_that_are_carried_are_all_that_fused_offers() -> None:
    offered = {
        name for name, value in vars(fused).items() if callable(value) and value.__module__ == fused.__name__
    } - {"built"}
    assert {name for name in offered if not name.startswith("_")} == set(composed.LAYERS)
    for name in ("dcnv3", "packed_dcnv3"):
        ours = set(inspect.signature(getattr(operator, name)).parameters)
        assert set(inspect.signature(getattr(composed, name)).parameters) - {"options"} <= ours


@pytest.mark.parametrize(
    "options",
    [{}, LIKE_H, {"post_norm": True, "layer_scale": 0.1, "offset_scale": 2.0, "share_weights": False}],
    ids=["t", "h", "l-unshared"],
)
def test_the_carried_model_computes_what_the_package_does(options, carried) -> None:
    torch.manual_seed(0)
    ours = InternImage(**SIZES, **options).eval()
    with torch.no_grad():
        for name, value in ours.named_parameters():
            if name.endswith(("offset.weight", "mask.weight", "center_scale.weight")):
                value.copy_(torch.randn_like(value) * 0.1)
    theirs = carried.InternImage(**SIZES, **options).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=0, atol=1e-5)
    theirs.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())
