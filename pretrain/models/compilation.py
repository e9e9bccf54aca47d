"""torch.compile in regions: each block, not the model as a whole.

A region is compiled once for each shape that it meets: the 32 blocks of a stage share one program, so that compiling
takes minutes for no model, and ZeRO-3 may gather and free parameters between regions, where its hooks stay in eager
mode. What lies between regions (mixing, the draw of drop path, losses, collectives) runs as it always does.
"""

from typing import TypeVar

import torch
from torch import nn

Kind = TypeVar("Kind", bound=type[nn.Module])

_REGIONS: set[type[nn.Module]] = set()
_PROGRAMS = 64  # of one region's source: stages x with and without gradient x with and without drop path


def compiled_region(kind: Kind) -> Kind:
    """Class decorator: `compile_regions` compiles the forward pass of these modules, each as one graph."""
    _REGIONS.add(kind)
    return kind


def regions(module: nn.Module) -> list[nn.Module]:
    """The outermost regions inside `module`, itself included."""
    if type(module) in _REGIONS:
        return [module]
    return [region for child in module.children() for region in regions(child)]


def compile_regions(module: nn.Module, backend: str = "inductor") -> list[nn.Module]:
    """Compile every region of `module` in place, at its first call; the regions.

    Only `forward` is compiled, so that a module's hooks stay outside, and names in the state dict do not change. An
    operation that does not compile is an error, never a silent way back to eager mode.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, _PROGRAMS)
    found = regions(module)
    for region in found:
        compiled = torch.compile(region.forward, fullgraph=True, dynamic=False, backend=backend)
        region.forward = compiled  # type: ignore[method-assign]
    return found
