"""What a pretraining run leaves to others: the image encoder, and the text tower where it goes along.

export("runs/h-m3i", "official", "internimage_h.pth")        write: export, and a module a layout
load_backbone(model, "internimage_h.pth", allow=("head.",))  read back: backbone
"""

from pretrain.handoff.backbone import Backbone, load_backbone, read_backbone
from pretrain.handoff.export import FORMATS, OnnxOptions, export

__all__ = ["FORMATS", "Backbone", "OnnxOptions", "export", "load_backbone", "read_backbone"]
