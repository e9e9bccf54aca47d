"""Dense training as a loop in plain PyTorch: one process, the joined batch, torchvision's and transformers' own losses.

The module's weights and its keyed draws are the product's; batches, padding, losses, schedule and optimizer are not.
"""

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import resize_boxes
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from data_pipeline.reading import Reader
from pretrain.configuration import RunConfig
from pretrain.models.randomness import drawing_from
from pretrain.objectives.keys import StepKeys, sample_keys
from pretrain.tasks.detection.heads import JoinedRoIHeads
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
            losses.append(float(loss.detach()))
    return losses


def padded_images(batch, config: RunConfig) -> Tensor:
    """Each picture normalised, then zeros up to the next multiple of 32 of the largest. As one factor and one summand,
    since the last bit of a pixel decides between proposals of equal scores.
    """
    sizes = batch.targets.sizes.tolist()
    height, width = (-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True))
    images = torch.zeros(len(sizes), 3, height, width)
    factor = torch.tensor([1 / (255 * std) for std in config.data.std])
    shift = torch.tensor([-mean / std for mean, std in zip(config.data.mean, config.data.std, strict=True)])
    for row, (tall, wide) in enumerate(sizes):
        view = torch.addcmul(shift, batch.views[row, 0, :tall, :wide].float(), factor)
        images[row, :, :tall, :wide] = view.permute(2, 0, 1)
    return images


def regions(module, images: Tensor, targets) -> Tensor:
    class Plain(JoinedRoIHeads):
        forward = RoIHeads.forward  # the losses of one process

    module.rpn.__class__, module.roi_heads.__class__ = RegionProposalNetwork, Plain
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
        left, top, right, bottom = box.unbind(1)
        # In this order: a proposal may lie exactly on an object's centre, and the gradient of L1 there is a sign.
        shares = [(left + right) / 2 / width, (top + bottom) / 2 / height]
        shares += [(right - left) / width, (bottom - top) / height]
        labels.append({"class_labels": label, "boxes": torch.stack(shares, 1)})
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


@torch.no_grad()
def plain_detections(module, pixels: np.ndarray, config: RunConfig, image_id: int, ids: list[int]) -> list[dict]:
    """COCO's results of one picture by torchvision's modules alone, as its reference script writes them."""
    height, width = pixels.shape[:2]
    factor = min(64 / min(height, width), 96 / max(height, width))
    size = round(height * factor), round(width * factor)
    view = F.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)[
        0
    ].permute(1, 2, 0)
    images = np.zeros((1, 3, *(-(-side // 32) * 32 for side in size)), np.float32)
    images[0, :, : size[0], : size[1]] = ((view.numpy() / 255 - config.data.mean) / config.data.std).transpose(2, 0, 1)
    stages = [stage.permute(0, 3, 1, 2) for stage in module.image.forward_stages(torch.from_numpy(images))]
    maps = module.fpn({str(level): stage for level, stage in enumerate(stages)})
    listed = ImageList(torch.from_numpy(images), [size])
    proposals, _ = RegionProposalNetwork.forward(module.rpn, listed, maps)
    (found,), _ = RoIHeads.forward(module.roi_heads, maps, proposals, [size])
    boxes = resize_boxes(found["boxes"], size, (height, width))
    masks = paste_masks_in_image(found["masks"], boxes, (height, width))[:, 0] > 0.5
    results = []
    for box, mask, label, score in zip(boxes, masks, found["labels"], found["scores"], strict=True):
        left, top, right, bottom = box.tolist()
        coded = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        coded["counts"] = coded["counts"].decode()
        result = {"image_id": image_id, "category_id": ids[int(label) - 1], "score": float(score)}
        results.append({**result, "bbox": [left, top, right - left, bottom - top], "segmentation": coded})
    return results
