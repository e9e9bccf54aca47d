"""Detectors and segmenters take the tiny variant as a timm backbone and make a training step with it."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

import pretrain.models  # noqa: F401  registers internimage_t


def step_moves_the_backbone(model: nn.Module, loss: torch.Tensor, prefix: str) -> None:
    """The loss is finite, and one step of SGD on it changes every part of the backbone that a feature comes from."""
    assert loss.isfinite()
    loss.backward()
    backbone = {name: p for name, p in model.named_parameters() if name.startswith(prefix)}
    assert len(backbone) > 500
    before = {name: p.detach().clone() for name, p in backbone.items()}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name in ("stem.conv1.weight", "stages.0.blocks.0.dcn.offset.weight", "stages.3.blocks.3.mlp.fc2.weight"):
        moved = [key for key in backbone if key.endswith(name) and not torch.equal(backbone[key], before[key])]
        assert len(moved) == 1, name
    assert all(p.isfinite().all() for p in backbone.values())


def test_torchvisions_mask_rcnn_over_a_feature_pyramid():
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = timm.create_model("internimage_t", features_only=True, drop_path_rate=0.0)
            self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 32, LastLevelMaxPool())
            self.out_channels = 32

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return self.fpn(OrderedDict((str(i), f) for i, f in enumerate(self.body(x))))

    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5)
    model = MaskRCNN(Pyramid(), num_classes=3, min_size=96, max_size=96, rpn_anchor_generator=anchors).train()
    masks = torch.zeros(1, 96, 96, dtype=torch.uint8)
    masks[:, 16:64, 24:80] = 1
    target = {"boxes": torch.tensor([[24.0, 16.0, 80.0, 64.0]]), "labels": torch.tensor([1]), "masks": masks}
    losses = model([torch.rand(3, 96, 96)], [target])
    assert set(losses) >= {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    step_moves_the_backbone(model, sum(losses.values()), "backbone.body.")


@pytest.mark.parametrize("kind", ["upernet", "mask2former"])
def test_hugging_faces_segmenters_over_the_timm_backbone(kind):
    transformers = pytest.importorskip("transformers")
    backbone = transformers.TimmBackboneConfig(backbone="internimage_t", out_indices=[0, 1, 2, 3])
    torch.manual_seed(0)
    x = torch.rand(1, 3, 64, 64)
    if kind == "upernet":
        config = transformers.UperNetConfig(
            backbone_config=backbone, hidden_size=32, num_labels=3, auxiliary_in_channels=256, auxiliary_channels=16
        )
        model = transformers.UperNetForSemanticSegmentation(config).train()
        # The pyramid pools to one pixel, where its BatchNorm has a batch of one image to see: not in training mode.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        loss = model(x, labels=torch.randint(0, 3, (1, 64, 64))).loss
    else:
        config = transformers.Mask2FormerConfig(
            backbone_config=backbone,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=5,
            num_labels=3,
            train_num_points=64,
        )
        model = transformers.Mask2FormerForUniversalSegmentation(config).train()
        masks = torch.zeros(2, 64, 64)
        masks[0, :32], masks[1, 32:] = 1, 1
        loss = model(x, mask_labels=[masks], class_labels=[torch.tensor([0, 2])]).loss
    step_moves_the_backbone(model, loss.sum(), "")


def test_a_unet_of_segmentation_models_pytorch():
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = smp.Unet(
        "tu-internimage_t",
        encoder_weights=None,
        in_channels=4,
        classes=3,
        decoder_channels=(16, 16, 16, 8, 8),
        drop_path_rate=0.0,
    ).train()
    logits = model(torch.rand(2, 4, 64, 64))
    assert logits.shape == (2, 3, 64, 64)
    loss = nn.functional.cross_entropy(logits, torch.randint(0, 3, (2, 64, 64)))
    step_moves_the_backbone(model, loss, "encoder.")


def test_hugging_faces_detr_over_the_timm_backbone():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DetrConfig(
        backbone_config=transformers.TimmBackboneConfig(backbone="internimage_t", out_indices=[0, 1, 2, 3]),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        num_labels=3,
    )
    model = transformers.DetrForObjectDetection(config).train()
    # DETR freezes what its names do not call a ResNet's later stages
    for parameter in model.parameters():
        parameter.requires_grad_()
    target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]])}
    loss = model(torch.rand(1, 3, 64, 64), labels=[target]).loss
    step_moves_the_backbone(model, loss, "")
