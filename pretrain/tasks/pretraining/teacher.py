"""The momentum teacher: the image encoder with its fused map, and the projector behind it, by the module's names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models import InternImage
from pretrain.objectives import losses


class Teacher(nn.Module):
    """Normalised images [B, 3, S, S] -> LN(projected tokens) [B, N, D] without affine, or the unit projection [B, D]
    of the pooled vector.

    Training writes the EMA into its parameters; it never draws drop path and never takes a gradient.
    """

    def __init__(self, image: nn.Module, projector: nn.Module, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        self.image: Any = image
        self.projects = "projector" if dense else "pooled_projector"
        self.add_module(self.projects, projector)
        for name in ("head", "fc_norm", *(("clip_projector",) if dense else ())):
            setattr(self.image, name, nn.Identity())
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.image.forward_fused(images).flatten(1, 2)
        if self.dense:
            projected = losses.full(self.get_submodule(self.projects)(tokens))
            return F.layer_norm(projected, projected.shape[-1:], eps=1e-6)
        return losses.unit(self.get_submodule(self.projects)(self.image.clip_projector(tokens)))


@dataclass(frozen=True)
class TeacherRecipe:
    """How the teacher of a module is made. image, projector: its empty parts. dense: token maps, not pooled vectors."""

    image: Callable[[], InternImage]
    projector: Callable[[], nn.Module]
    dense: bool

    @property
    def averaged(self) -> tuple[str, ...]:
        """Prefixes of the module's parameters that the teacher has."""
        heads = ("projector.",) if self.dense else ("pooled_projector.", "image.clip_projector.")
        return ("image.stem.", "image.stages.", "image.fuse.", *heads)

    def build(self, module: nn.Module) -> Teacher:
        """A teacher with the present values of `module`."""
        like = next(module.parameters())
        # Made on the meta device, so that it neither draws from the generator nor is initialised twice.
        with torch.device("meta"):
            teacher = Teacher(self.image(), self.projector(), self.dense)
        teacher = teacher.to(like.dtype).to_empty(device=like.device)
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, value in [*teacher.named_parameters(), *teacher.named_buffers()]:
            if own[name].shape == value.shape:
                value.data.copy_(own[name].data)
        return teacher
