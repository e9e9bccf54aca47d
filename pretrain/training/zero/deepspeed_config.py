"""The DeepSpeed JSON that a run's configuration means. Pure: no torch, no deepspeed."""

from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.reading.order.share import rows_per_rank
from pretrain.configuration.schema import TrainingConfig

LARGEST_BUCKET = 50_000_000
LARGEST_RECEIVED = 33_554_432  # values of a teacher's refresh, of all ranks together: 64 MiB in half precision
ALIGNMENT = 64  # of flat buffers; DeepSpeed asks for an even number
QUIET = 10**9


def derive(
    training: TrainingConfig,
    clip_grad: float | None,
    given: Mapping[str, Any],
    *,
    world_size: int,
    parameters: int,
    cuda: bool,
) -> dict[str, Any]:
    """The JSON. The raw keys in `given` are merged last, key by key, so that anything DeepSpeed knows can be said.

    parameters: trainable parameters, which bound the communication buckets. Raises UserError for a batch or a
    secondary partition that does not divide.
    """
    micro = rows_per_rank(training.batch_size, training.accumulation, world_size)
    if training.precision == "fp16" and not cuda:
        raise UserError("training.precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    bucket = min(LARGEST_BUCKET, -(-parameters // ALIGNMENT) * ALIGNMENT or ALIGNMENT)
    stage = training.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": cuda and stage > 0,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": min(100_000, max(1, parameters // 100)),
        }
    if (secondary := training.secondary_partition) is not None:
        if world_size % secondary:
            raise UserError(
                f"training.secondary_partition {secondary} does not divide {world_size} ranks: give the ranks of a node"
            )
        zero["zero_hpz_partition_size"] = secondary
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if training.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    if (training.offload_optimizer and stage == 0) or (training.offload_parameters and stage != 3):
        raise UserError(
            "training.offload_optimizer needs zero_stage 1, 2 or 3; training.offload_parameters needs zero_stage 3; "
            f"zero_stage is {stage}"
        )
    derived: dict[str, Any] = {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": clip_grad or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": QUIET,
        "wall_clock_breakdown": False,
    }
    if training.precision == "bf16":
        derived["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if training.accumulation > 1 and stage > 0:
            derived["data_types"] = {"grad_accum_dtype": "fp32"}
    elif training.precision == "fp16":
        derived["fp16"] = {"enabled": True, "auto_cast": False}
    if training.precision != "fp32" and training.reduce_gradients == "fp32":
        derived["communication_data_type"] = "fp32"
    if stage == 0 and training.precision == "fp32":
        derived["gradient_clipping"] = 0.0  # the engine clips, since DeepSpeed would not report the norm here
    return merge(derived, given)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested update; `over` wins."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
