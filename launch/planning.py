"""`internimage plan`: a configuration, counted on the meta device, into the pure functions of the plan."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from launch.machines import Machine
from launch.needs import cores_per_rank
from launch.preflight import check_batch
from pretrain.analysis import costs, plan
from pretrain.analysis.communication import exposed_seconds, step_traffic
from pretrain.configuration import RunConfig
from pretrain.configuration.schema import RecomputeBudget
from pretrain.models.activations import Activations, image_activations
from pretrain.models.recomputation import values_within
from pretrain.tasks.pretraining.recipes import RECIPES
from pretrain.tasks.pretraining.task import Pretraining

if TYPE_CHECKING:
    from torch import nn

_AS_FAST = 1.05  # times the fastest step: less is nothing that a model of communication can tell


@dataclass(frozen=True)
class Counts:
    """What one run computes, per sample: multiply-adds of passes with gradient, and without, as the teacher's.
    arguments: of its InternImage. transformers: activations of what stands beside it (text tower, decoder, heads), in
    values.
    """

    sizes: plan.Sizes
    modules: dict[str, int]
    trained_multiply_adds: float
    untrained_multiply_adds: float
    arguments: dict[str, Any]
    image_size: int
    transformers: Activations
    contrastive_images: int = 0  # of a row, that meet the texts of all ranks

    def activations(self, recompute: str | RecomputeBudget, rows: int, width: int) -> Activations:
        """Values of one sample among `rows` at once, of `width` bytes. Raises UserError for a budget too small."""
        budget = None
        if isinstance(recompute, RecomputeBudget):
            budget = values_within(recompute.budget_gb, self.arguments, self.image_size, rows=rows, width=width)
        blocks = recompute == "blocks"
        image = image_activations(self.arguments, self.image_size, checkpointing=blocks, budget=budget)
        return image + self.transformers

    @property
    def flops_per_sample(self) -> float:
        """The model's, of a training step: forward, twice that backward; what is not trained only forward. Without
        recomputation.
        """
        return 2.0 * (3.0 * self.trained_multiply_adds + self.untrained_multiply_adds)

    def executed_flops(self, recompute: str | RecomputeBudget) -> float:
        """With what is computed again in the backward pass: every block's forward pass, under a budget at most that."""
        again = 0.0 if recompute == "none" else self.trained_multiply_adds
        return self.flops_per_sample + 2.0 * again


def count(config: RunConfig, classes: int) -> Counts:
    """Builds the task without memory and counts it. Raises UserError where the configuration fits no task."""
    import torch

    from pretrain.models.counting import multiply_adds
    from pretrain.tasks.module import image_of
    from pretrain.tasks.task import module_of, task_of
    from pretrain.training.parameter_groups import is_map

    with torch.device("meta"):
        module = module_of(config, classes=classes).to("meta")  # torch.Tensor(...) heeds no context
    parameters = dict(module.named_parameters())
    averaged = set(module.teacher_names())
    sizes = plan.Sizes(
        trainable=sum(p.numel() for p in parameters.values() if p.requires_grad),
        frozen=sum(p.numel() for p in parameters.values() if not p.requires_grad),
        teacher=sum(p.numel() for name, p in parameters.items() if name in averaged),
        muon=sum(
            p.numel()
            for name, p in parameters.items()
            if config.optimizer.name == "muon" and p.requires_grad and is_map(name, p.shape)
        ),
    )
    modules = {name: sum(p.numel() for p in part.parameters()) for name, part in module.named_children()}
    arguments, size = image_of(module).arguments, task_of(config).planned_side(config.data)
    image = float(multiply_adds(arguments, size).total)
    values, head = module.head_costs(size)
    width = 4 if config.training.precision == "fp32" else 2
    heads = Activations(values * 4 / width)  # heads compute in fp32
    counts = Counts(sizes, modules, image + head, image if averaged else 0.0, arguments, size, heads)
    if not isinstance(config.task, Pretraining):
        return counts
    return _with_heads(counts, config, config.task, dict(module.named_children()).get("text"))


def _with_heads(counts: Counts, config: RunConfig, task: Pretraining, tower: "nn.Module | None") -> Counts:
    """`counts` of the image models, with the decoder and the text tower."""
    recipe, decoder, keep = RECIPES[task.preset], task.decoder, config.model.recompute != "none"
    width = int(counts.arguments.get("clip_embed_dim", 1024))  # of the fused map
    image, tokens = counts.trained_multiply_adds, (counts.image_size // 16) ** 2
    trained, untrained, activations = image, counts.untrained_multiply_adds, counts.transformers
    weight = {"intra": task.weights.intra, "inter": task.weights.inter}
    if targets := sum(weight[target.name] > 0 for target in recipe.dense):
        seen = tokens * (task.mask_ratio if recipe.image == "mixed" else 1 - task.mask_ratio)
        for length, layers in ((seen, decoder.projector_layers), (seen + tokens, decoder.layers)):
            trained += targets * costs.transformer_multiply_adds(length, decoder.dim, layers)
            activations += costs.transformer_activations(targets * length, decoder.dim, layers, checkpointing=keep)
        trained += targets * (seen * width * decoder.dim + tokens * 3.0 * decoder.dim**2)
        projection = costs.transformer_multiply_adds(tokens, decoder.dim, decoder.projector_layers)
        untrained = targets * (image + tokens * width * decoder.dim + projection)
    if tower is not None and task.text.kind == "transformer":  # a bag of words is looked up, not multiplied
        length = config.data.context_length
        text = costs.text_tower_multiply_adds(tower, length)
        if task.text.frozen:
            untrained += text
        else:
            trained += text
            width, layers = costs.text_tower_shape(tower)
            activations += costs.transformer_activations(length, width, layers, checkpointing=keep)
    if tower is not None:
        counts = replace(counts, contrastive_images=2 if recipe.image == "mixed" else 1)
    return replace(counts, trained_multiply_adds=trained, untrained_multiply_adds=untrained, transformers=activations)


def plan_run(config: RunConfig, *, gpus: int, machine: Machine, epoch_samples: int | None = None) -> dict[str, Any]:
    """Everything that `internimage plan` says, as plain values. Bytes unless the name says otherwise."""
    check_batch(config, gpus)
    training = config.training
    found, sample_bytes, classes = _look_at_sources(config)
    counts = count(config, config.model.num_classes or classes)
    width = 4 if training.precision == "fp32" else 2
    device = machine.memory * plan.GIGABYTE if machine.memory is not None else None
    share, said = machine.likely(counts.modules.get("image", counts.sizes.trainable))
    flops, executed = counts.flops_per_sample, counts.executed_flops(config.model.recompute)
    secondary = training.secondary_partition
    if secondary is not None and gpus % secondary:
        raise UserError(f"training.secondary_partition {secondary} does not divide {gpus} ranks")
    reduction = 4.0 if training.reduce_gradients == "fp32" else float(width)

    def per_sample(ranks: int = gpus, accumulation: int = training.accumulation) -> float:
        rows = training.batch_size // (ranks * accumulation)
        return width * counts.activations(config.model.recompute, rows, width).peak

    def memory(stage: int, accumulation: int = training.accumulation, ranks: int = gpus) -> plan.Memory:
        rows = training.batch_size // (ranks * accumulation)
        similarities = (
            plan.contrastive_bytes(rows, ranks, counts.contrastive_images) if counts.contrastive_images else 0
        )
        return plan.rank_memory(
            counts.sizes,
            stage=stage,
            ranks=ranks,
            precision=training.precision,
            accumulation=accumulation,
            ema=training.ema.enabled,
            offload_optimizer=training.offload_optimizer,
            offload_parameters=training.offload_parameters,
            offload_folder=training.offload_folder is not None,
            asynchronous=config.checkpoint.asynchronous,
            reduction_bytes=reduction,
            secondary_ranks=secondary,
            activations=per_sample(ranks, accumulation) * rows + similarities,
        )

    def step(stage: int, accumulation: int = training.accumulation, ranks: int = gpus) -> dict[str, Any]:
        """Traffic, and seconds of a step at the highest and the lowest share, communication included."""
        traffic = step_traffic(
            counts.sizes,
            stage=stage,
            ranks=ranks,
            precision=training.precision,
            reduction_bytes=reduction,
            accumulation=accumulation,
            secondary_ranks=secondary,
        )
        timed: dict[str, Any] = {
            "sent": traffic.total,
            **{f"sent_{k}": v for k, v in asdict(traffic).items() if k != "overlapped"},
        }
        if machine.peak is None or share is None:
            return {**timed, "step_seconds": None, "exposed_seconds": None}
        compute = [flops * training.batch_size / (ranks * machine.peak * 1e12 * one) for one in share[::-1]]
        exposed = [
            exposed_seconds(traffic, seconds, machine.network, stage=stage, ranks=ranks, secondary_ranks=secondary)
            if machine.network
            else 0.0
            for seconds in compute
        ]
        both = [a + b for a, b in zip(compute, exposed, strict=True)]
        return {**timed, "step_seconds": both, "exposed_seconds": exposed}

    def row(stage: int) -> dict[str, Any]:
        one = memory(stage)
        fixed = one.states + one.buckets
        micro, fits = None, None
        if device is not None:
            micro = plan.largest_micro_batch(
                fixed, per_sample(), device, ranks=gpus, contrastive_images=counts.contrastive_images
            )
            fits = one.total <= plan.RESERVE * device
        return {**asdict(one), "total": one.total, "fits": fits, "largest_micro_batch": micro, **step(stage)}

    stages = [row(stage) for stage in plan.STAGES]
    epoch = epoch_samples or found
    samples = _samples(config, epoch)

    def days(seconds: list[float] | None) -> list[float] | None:
        if seconds is None or samples is None:
            return None
        return [samples / training.batch_size * one / plan.SECONDS_A_DAY for one in seconds]

    def best(ranks: int) -> dict[str, Any] | None:
        """The fewest micro-batches, and of the stages that fit then the first that is as fast as any."""
        if device is None:
            return None
        for accumulation in range(training.accumulation, training.batch_size // ranks + 1):
            if training.batch_size % (ranks * accumulation):
                continue
            fitting = [s for s in plan.STAGES if memory(s, accumulation, ranks).total <= plan.RESERVE * device]
            timed = {stage: step(stage, accumulation, ranks) for stage in fitting}
            if not fitting:
                continue
            fastest = min((timed[s]["step_seconds"] or [0.0])[0] for s in fitting)
            stage = next(s for s in fitting if (timed[s]["step_seconds"] or [0.0])[0] <= _AS_FAST * fastest)
            return {
                "gpus": ranks,
                "zero_stage": stage,
                "accumulation": accumulation,
                "micro_batch": training.batch_size // (ranks * accumulation),
                "total": memory(stage, accumulation, ranks).total,
                "exposed_seconds": timed[stage]["exposed_seconds"],
                "days": days(timed[stage]["step_seconds"]),
            }
        return None

    configured = stages[training.zero_stage]
    others = [n for n in (gpus // 4, gpus // 2, gpus, gpus * 2, gpus * 4) if n >= 1 and training.batch_size % n == 0]
    rate = [training.batch_size / one for one in configured["step_seconds"]] if configured["step_seconds"] else None
    return {
        "gpus": gpus,
        "device_memory": device,
        "usable_share": plan.RESERVE,
        "precision": training.precision,
        "recompute": config.model.model_dump()["recompute"],
        "parameters": {**asdict(counts.sizes), **counts.modules},
        "micro_batch": training.batch_size // (gpus * training.accumulation),
        "activations_per_sample": per_sample(),
        "stages": stages,
        "configured_stage": training.zero_stage,
        "advice": best(gpus),
        "scaling": [row_of for n in dict.fromkeys(others) if (row_of := best(n)) is not None],
        "divides_the_batch": [n for n in range(1, training.batch_size + 1) if training.batch_size % n == 0],
        "flops_per_sample": flops,
        "executed_flops_per_sample": executed,
        "samples": samples,
        "share_of_peak": share,
        "peak_tflops": machine.peak,
        "images_per_second": rate,
        "days": days(configured["step_seconds"]),
        "data_bytes_per_second": [one * sample_bytes for one in rate] if rate and sample_bytes else None,
        "data_bytes": sample_bytes * epoch if sample_bytes and epoch else None,
        "cores_per_rank": cores_per_rank(config),
        "checkpoint_bytes": plan.checkpoint_bytes(counts.sizes, ema=training.ema.enabled),
        "checkpoints_kept": config.checkpoint.keep + 1,
        "files_a_save": gpus + 4,
        "assumptions": [*machine.assumptions, *said],
    }


def _samples(config: RunConfig, epoch: int | None) -> int | None:
    schedule = config.schedule
    if schedule.steps:
        return schedule.steps * config.training.batch_size
    return round(schedule.epochs * epoch) if epoch and schedule.epochs else None


def _look_at_sources(config: RunConfig) -> tuple[int | None, float | None, int]:
    """Samples of an epoch, bytes of one in the shards, and classes, from the manifests that are here. None for both
    where one is missing.
    """
    samples, size, classes = 0, 0, 0
    known = True
    for source in config.data.sources:
        path = Path(source.path) / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            here, named = int(manifest["samples"]), len(manifest.get("classes") or ())
        except FileNotFoundError:
            known = False
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a manifest of shards ({error}); `internimage shards index` makes one"
            ) from None
        samples += here
        size += sum(shard.stat().st_size for shard in Path(source.path).glob("*.tar"))
        classes = max(classes, named)
    if not known or not samples:
        return None, None, classes
    return samples, size / samples or None, classes
