"""`internimage plan`: a configuration, counted on the meta device, into the pure functions of the plan."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from launch.display import columns
from launch.preflight import check_batch
from pretrain.analysis import costs, plan
from pretrain.configuration import RunConfig
from pretrain.configuration.schema import RecomputeBudget
from pretrain.models.activations import Activations, image_activations
from pretrain.models.recomputation import values_within
from pretrain.tasks.pretraining.recipes import RECIPES
from pretrain.tasks.pretraining.task import Pretraining

_SUMS = ("trainable", "frozen", "teacher")


@dataclass(frozen=True)
class Counts:
    """What one run computes, per sample: multiply-adds of passes with and without gradient. arguments: of its
    InternImage. transformers: activations of text tower and decoder, in values.
    """

    sizes: plan.Sizes
    modules: dict[str, int]
    trained_multiply_adds: float
    teacher_multiply_adds: float
    arguments: dict[str, Any]
    image_size: int
    transformers: Activations

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
        """The model's, of a training step: forward, twice that backward; the teacher only forward. No recomputation."""
        return 2.0 * (3.0 * self.trained_multiply_adds + self.teacher_multiply_adds)


def count(config: RunConfig, classes: int) -> Counts:
    """Builds the task without memory and counts it. Raises UserError where the configuration fits no task."""
    import torch

    from pretrain.models.counting import multiply_adds
    from pretrain.tasks.module import image_of
    from pretrain.tasks.task import module_of

    with torch.device("meta"):
        module = module_of(config, classes=classes)
    parameters = dict(module.named_parameters())
    averaged = set(module.teacher_names())
    sizes = plan.Sizes(
        trainable=sum(p.numel() for p in parameters.values() if p.requires_grad),
        frozen=sum(p.numel() for p in parameters.values() if not p.requires_grad),
        teacher=sum(p.numel() for name, p in parameters.items() if name in averaged),
    )
    modules = {name: sum(p.numel() for p in part.parameters()) for name, part in module.named_children()}
    arguments, size = image_of(module).arguments, config.data.image_size
    image = float(multiply_adds(arguments, size).total)
    counts = Counts(sizes, modules, image, image if averaged else 0.0, arguments, size, Activations(0.0))
    return _with_heads(counts, config, config.task) if isinstance(config.task, Pretraining) else counts


def _with_heads(counts: Counts, config: RunConfig, task: Pretraining) -> Counts:
    """`counts` of the image models, with the decoder and the text tower."""
    recipe, decoder, text, keep = RECIPES[task.preset], task.decoder, task.text, config.model.recompute != "none"
    width = int(counts.arguments.get("clip_embed_dim", 1024))  # of the fused map
    image, tokens = counts.trained_multiply_adds, (counts.image_size // 16) ** 2
    trained, teacher, activations = image, counts.teacher_multiply_adds, counts.transformers
    weight = {"intra": task.weights.intra, "inter": task.weights.inter}
    if targets := sum(weight[target.name] > 0 for target in recipe.dense):
        seen = tokens * (task.mask_ratio if recipe.image == "mixed" else 1 - task.mask_ratio)
        for length, layers in ((seen, decoder.projector_layers), (seen + tokens, decoder.layers)):
            trained += targets * costs.transformer_multiply_adds(length, decoder.dim, layers)
            activations += costs.transformer_activations(targets * length, decoder.dim, layers, checkpointing=keep)
        trained += targets * (seen * width * decoder.dim + tokens * 3.0 * decoder.dim**2)
        projection = costs.transformer_multiply_adds(tokens, decoder.dim, decoder.projector_layers)
        teacher = targets * (image + tokens * width * decoder.dim + projection)
    if "text" in counts.modules:
        length = config.data.context_length
        trained += costs.transformer_multiply_adds(length, text.width, text.layers)
        activations += costs.transformer_activations(length, text.width, text.layers, checkpointing=keep)
    return replace(counts, trained_multiply_adds=trained, teacher_multiply_adds=teacher, transformers=activations)


def plan_run(
    config: RunConfig, *, gpus: int, memory_gb: float, mfu: float, peak_tflops: float, epoch_samples: int | None = None
) -> dict[str, Any]:
    """Everything that `internimage plan` says, as plain values. Bytes unless the name says otherwise."""
    check_batch(config, gpus)
    training = config.training
    found, classes = _look_at_sources(config)
    counts = count(config, config.model.num_classes or classes)
    width = 4 if training.precision == "fp32" else 2
    device = memory_gb * plan.GIGABYTE

    def per_sample(accumulation: int = training.accumulation) -> float:
        rows = training.batch_size // (gpus * accumulation)
        return width * counts.activations(config.model.recompute, rows, width).peak

    def memory(stage: int, accumulation: int = training.accumulation) -> plan.Memory:
        return plan.rank_memory(
            counts.sizes,
            stage=stage,
            ranks=gpus,
            precision=training.precision,
            accumulation=accumulation,
            ema=training.ema.enabled,
            offload_optimizer=training.offload_optimizer,
            offload_parameters=training.offload_parameters,
            offload_folder=training.offload_folder is not None,
            asynchronous=config.checkpoint.asynchronous,
            activations=per_sample(accumulation) * training.batch_size // (gpus * accumulation),
        )

    stages = []
    for stage in plan.STAGES:
        one = memory(stage)
        micro = plan.largest_micro_batch(one.total - one.activations, per_sample(), device)
        fits = one.total <= plan.RESERVE * device
        stages.append({**asdict(one), "total": one.total, "fits": fits, "largest_micro_batch": micro})
    accumulations = [
        a for a in range(training.accumulation, training.batch_size // gpus + 1) if not _rest(config, gpus, a)
    ]
    advice = None
    for accumulation in accumulations:
        best = plan.smallest_stage(lambda stage, a=accumulation: memory(stage, a), device)  # type: ignore[misc]
        if best is not None:
            advice = {"zero_stage": best, "accumulation": accumulation}
            break
    epoch = epoch_samples or found
    schedule = config.schedule
    samples = schedule.steps * training.batch_size if schedule.steps else None
    if samples is None and epoch and schedule.epochs:
        samples = round(schedule.epochs * epoch)
    flops = counts.flops_per_sample
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
        "advice": advice,
        "flops_per_sample": flops,
        "samples": samples,
        "mfu": mfu,
        "peak_tflops": peak_tflops,
        "images_per_second": gpus * peak_tflops * 1e12 * mfu / flops,
        "days": plan.days(samples, flops, ranks=gpus, peak_flops=peak_tflops * 1e12, mfu=mfu) if samples else None,
    }


def _rest(config: RunConfig, gpus: int, accumulation: int) -> int:
    return config.training.batch_size % (gpus * accumulation)


def _look_at_sources(config: RunConfig) -> tuple[int | None, int]:
    """Samples of an epoch and classes, from the manifests that are here. None samples where one is missing."""
    samples: int | None = 0
    classes = 0
    for source in config.data.sources:
        path = Path(source.path) / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            here, named = int(manifest["samples"]), len(manifest.get("classes") or ())
        except FileNotFoundError:
            samples = None
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a manifest of shards ({error}); `internimage shards index` makes one"
            ) from None
        samples = None if samples is None else samples + here
        classes = max(classes, named)
    return samples, classes


def as_text(result: dict[str, Any]) -> str:
    """The plan for people."""
    sizes = result["parameters"]
    total = sizes["trainable"] + sizes["frozen"]
    parts = ", ".join(f"{k} {v / 1e6:.1f}" for k, v in sizes.items() if k not in _SUMS and v > 1e5)
    recompute = result["recompute"]
    recomputed = f"{recompute['budget_gb']:g} GB of activations" if isinstance(recompute, dict) else recompute
    head = [
        f"{total / 1e6:.1f} M parameters ({parts}); the teacher's copy has {sizes['teacher'] / 1e6:.1f} M",
        f"{result['gpus']} ranks, micro-batch {result['micro_batch']}, {result['precision']}, recompute "
        f"{recomputed}: {result['activations_per_sample'] / 1e6:.0f} MB of activations a sample",
        "",
        "GB a rank, estimated:",
    ]
    names = ("parameters", "gradients", "optimizer", "average", "teacher", "buckets", "activations", "total")
    rows = [
        [
            f"ZeRO {stage['stage']}{'*' if stage['stage'] == result['configured_stage'] else ' '}",
            *(f"{stage[name] / 1e9:.2f}" for name in names),
            "fits" if stage["fits"] else "too much",
            str(stage["largest_micro_batch"]),
        ]
        for stage in result["stages"]
    ]
    heads = ["EMA" if name == "average" else name for name in names]
    table = columns(rows, ("", *heads, "", "largest micro-batch"))
    configured = next(stage for stage in result["stages"] if stage["stage"] == result["configured_stage"])
    beside = (
        f"Beside that, a rank as configured: {configured['host'] / 1e9:.2f} GB of the machine's memory (what is "
        f"offloaded, the copy for asynchronous checkpoints), {configured['files'] / 1e9:.2f} GB of files"
    )
    return "\n".join([*head, table, "* configured", beside, "", _advice(result), _time(result)])


def _advice(result: dict[str, Any]) -> str:
    room = f"{result['device_memory'] / 1e9:.0f} GB, of which {result['usable_share']:.0%} are planned with"
    if result["advice"] is None:
        return f"Nothing fits in {room}: use more devices, model.recompute, or offloading."
    advice = result["advice"]
    return (
        f"Smallest that fits in {room}: training.zero_stage={advice['zero_stage']} "
        f"training.accumulation={advice['accumulation']}"
    )


def _time(result: dict[str, Any]) -> str:
    speed = (
        f"{result['flops_per_sample'] / 1e9:.1f} GFLOP a sample (the model's; recomputation is not counted); at "
        f"{result['mfu']:.0%} of {result['peak_tflops']:.0f} TFLOP/s {result['images_per_second']:.0f} images/s"
    )
    if result["days"] is None:
        return f"{speed}. Days: the size of an epoch is not known here; give --samples."
    return f"{speed}, {result['samples']:,} samples in {result['days']:.2f} days, if no step waits for data."
