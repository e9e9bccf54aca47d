"""The image tower of this folder for open_clip: importing this registers it with timm, by whose name
open_clip_config.json asks for it. Needs torch and timm alone.
"""

import json
from pathlib import Path

from timm.models import register_model

from .internimage_internimage import InternImage

TOWER = json.loads((Path(__file__).parent / "tower.json").read_text(encoding="utf-8"))


class InternImageTower(InternImage):
    """Images [B, 3, S, S] -> the pooled vectors that meet the text, [B, embed_dim], not normalised."""

    def forward(self, x):
        return self.clip_projector(self.forward_fused(x).flatten(1, 2))


def _build(pretrained=False, *, num_classes=0, global_pool="", drop_path_rate=None, **_):
    """open_clip asks for no classifier and no pooling, which the tower does itself."""
    arguments = dict(TOWER["arguments"])
    if drop_path_rate is not None:
        arguments["drop_path_rate"] = drop_path_rate
    return InternImageTower(**{**arguments, "num_classes": 0})


_build.__name__ = _build.__qualname__ = TOWER["name"]
globals()[TOWER["name"]] = register_model(_build)
