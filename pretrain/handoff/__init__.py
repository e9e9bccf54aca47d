"""What a pretraining run leaves to others: the image encoder alone, in the layouts that they read.

export("runs/h-m3i", "official", "internimage_h.pth")        write: export, timm_folder, huggingface, onnx
load_backbone(model, "internimage_h.pth", allow=("head.",))  read back: backbone
"""

from pretrain.handoff.backbone import Backbone, load_backbone, read_backbone
from pretrain.handoff.export import FORMATS, export

__all__ = ["FORMATS", "Backbone", "export", "load_backbone", "read_backbone"]
