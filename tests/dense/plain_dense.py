"""Dense training as a loop in plain PyTorch: one process, the joined batch, torchvision's and transformers' own losses.

The module's weights and its keyed draws are the product's; batches, padding, losses, schedule and optimizer are not.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from data_pipeline.reading import Reader
from pretrain.configuration import RunConfig
from pretrain.models.randomness import drawing_from
from pretrain.objectives.keys import StepKeys, sample_keys
from pretrain.tasks.segmentation.criterion import JoinedMask2FormerLoss
from pretrain.tasks.task import task_of
from pretrain.training.distributed import seed_step
from pretrain.training.parameter_groups import parameter_groups
from pretrain.training.schedule import resolve_schedule


def plain_losses(config: RunConfig) -> list[float]:
    task = task_of(config)
    loss_of = LOSSES[config.task.name]
    with Reader(config.data, task.target_spec(config.data), batch_size=config.training.batch_size) as reader:
        schedule = resolve_schedule(
            config.schedule, config.optimizer, batch_size=config.training.batch_size, epoch_samples=reader.epoch_samples
        )
        seed_step(config.training.seed, -1, 0)
        module = task.build(config.model, config.data, classes=reader.num_classes)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        groups = parameter_groups({n: p.shape for n, p in trained.items()}, config.optimizer, module.backbone())
        adam = torch.optim.AdamW(
            [
                {"params": [trained[name] for name in group.names], "weight_decay": group.weight_decay}
                for group in groups
            ],
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
        )
        module.train()
        losses, batches = [], reader.batches()
        for step in range(schedule.total_steps):
            batch = next(batches)
            for group, entry in zip(groups, adam.param_groups, strict=True):
                entry["lr"] = schedule.lr(step) * group.lr_scale
            images = padded_images(batch, config)
            with drawing_from(sample_keys(StepKeys(config.training.seed, step), batch.positions)):
                loss = loss_of(module, images, batch.targets)
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), config.optimizer.clip_grad)
            adam.step()
            losses.append(float(loss))
    return losses


def padded_images(batch, config: RunConfig) -> Tensor:
    """Each picture normalised in numpy, then zeros up to the next multiple of 32 of the largest."""
    sizes = batch.targets.sizes.tolist()
    height, width = (-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True))
    images = np.zeros((len(sizes), 3, height, width), np.float32)
    for row, (tall, wide) in enumerate(sizes):
        view = batch.views[row, 0, :tall, :wide].numpy().astype(np.float64) / 255
        images[row, :, :tall, :wide] = ((view - config.data.mean) / config.data.std).transpose(2, 0, 1)
    return torch.from_numpy(images)


def regions(module, images: Tensor, targets) -> Tensor:
    module.rpn.__class__, module.roi_heads.__class__ = RegionProposalNetwork, RoIHeads
    wanted = [{"boxes": b, "labels": n + 1} for b, n in zip(targets.boxes, targets.labels, strict=True)]
    for one, mask in zip(wanted, targets.masks, strict=False):
        one["masks"] = mask
    stages = [stage.permute(0, 3, 1, 2) for stage in module.image.forward_stages(images)]
    maps = module.fpn({str(level): stage for level, stage in enumerate(stages)})
    sizes = [tuple(size) for size in targets.sizes.tolist()]
    proposals, losses = module.rpn(ImageList(images, sizes), maps, wanted)
    _, more = module.roi_heads(maps, proposals, sizes, wanted)
    return sum((losses | more).values())


def pixels(module, images: Tensor, targets) -> Tensor:
    batch_norms_of_torch(module)
    stages = [stage.permute(0, 3, 1, 2) for stage in module.image.forward_stages(images)]
    maps = F.pad(targets.maps.long(), (0, 64, 0, 64), value=255)[:, : images.shape[2], : images.shape[3]]

    def loss(logits: Tensor) -> Tensor:
        larger = F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(larger, maps, ignore_index=255)

    return loss(module.head(stages)) + 0.4 * loss(module.auxiliary_head(stages))


def batch_norms_of_torch(module) -> None:
    for head in (module.head, module.auxiliary_head):
        for layer in head.modules():
            if type(layer).__name__ == "GlobalBatchNorm2d":
                fresh = torch.nn.BatchNorm2d(len(layer.weight))
                parameters, buffers = layer._parameters, layer._buffers
                layer.__class__ = torch.nn.BatchNorm2d
                layer.__dict__.update(fresh.__dict__ | {"_parameters": parameters, "_buffers": buffers})


def query_masks(module, images: Tensor, targets) -> Tensor:
    """transformers' criterion as it is for one process, but for the points, which belong to the sample."""

    class Plain(JoinedMask2FormerLoss):
        loss_labels = Mask2FormerLoss.loss_labels
        get_num_masks = Mask2FormerLoss.get_num_masks

    module.net.criterion.__class__ = Plain
    height, width = images.shape[2:]
    masks = [F.pad(one.float(), (0, width, 0, height))[:, :height, :width] for one in targets.masks]
    return module.net(images, mask_labels=masks, class_labels=list(targets.labels)).loss


def query_boxes(module, images: Tensor, targets) -> Tensor:
    """transformers' loss of the decoder's layers, with Deformable DETR's weight of 2 on the classes, and of the
    proposals, by hand.
    """
    net, sizes = module.net, targets.sizes
    mask = torch.zeros(len(images), *images.shape[2:], dtype=torch.int64)
    for row, (height, width) in enumerate(sizes.tolist()):
        mask[row, :height, :width] = 1
    out = net(images, pixel_mask=mask)
    hidden = out.intermediate_hidden_states
    before = [out.init_reference_points, *out.intermediate_reference_points.unbind(1)[:-1]]
    logits = torch.stack([net.decoder.class_embed[n](hidden[:, n]) for n in range(hidden.shape[1])])
    boxes = torch.stack(
        [
            (net.decoder.bbox_embed[n](hidden[:, n]) + torch.special.logit(before[n], eps=1e-5)).sigmoid()
            for n in range(hidden.shape[1])
        ]
    )
    labels = []
    for box, label, (height, width) in zip(targets.boxes, targets.labels, sizes.tolist(), strict=True):
        left, top, right, bottom = (box / torch.tensor([width, height, width, height])).unbind(1)
        centre = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        labels.append({"class_labels": label, "boxes": torch.stack(centre, 1)})
    config = module.net.config
    config.auxiliary_loss = True
    _, found, _ = DeformableDetrForObjectDetectionLoss(logits[-1], labels, "cpu", boxes[-1], config, logits, boxes)
    nothing = [{**one, "class_labels": torch.zeros_like(one["class_labels"])} for one in labels]
    config.auxiliary_loss = False
    proposed = out.enc_outputs_coord_logits.sigmoid()
    _, more, _ = DeformableDetrForObjectDetectionLoss(out.enc_outputs_class, nothing, "cpu", proposed, config)
    total = torch.zeros(())
    for losses in (found, more):
        for name, value in losses.items():
            weight = {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}.get("_".join(name.split("_")[:2]), 0)
            total = total + weight * value
    return total


LOSSES = {
    "detection": regions,
    "instance": regions,
    "semantic": pixels,
    "query_instance": query_masks,
    "query_detection": query_boxes,
}
