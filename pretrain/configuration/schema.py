"""The typed schema of a run's YAML file, all but what each task brings itself. No `task:` means M3I-style pretraining.

Sections: `model`, `task`, `data`, `optimizer`, `schedule`, `training`, `checkpoint`, `evaluation`, `deepspeed` (passed
through).
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_pipeline.errors import UserError
from data_pipeline.reading.config import DataConfig, Section
from data_pipeline.reading.order.share import rows_per_rank


class RecomputeBudget(Section):
    budget_gb: float = Field(gt=0, description="activations of the image encoder on a rank, at their peak")


class ModelConfig(Section):
    name: str = Field("internimage_t", description="internimage_{t,s,b,l,xl,h,g}, or `custom` with all overrides given")
    num_classes: int = Field(0, ge=0, description="rows of the classifier; 0 takes the data's classes")
    overrides: dict[str, Any] = Field({}, description="arguments of InternImage that differ from the named variant")
    recompute: Literal["none", "blocks"] | RecomputeBudget = Field(
        "none", description="in the backward pass: nothing, every block, or what does not fit into {budget_gb: 20}"
    )
    compile: bool = Field(False, description="torch.compile each block and head, of the teacher too")

    @model_validator(mode="before")
    @classmethod
    def _older_key(cls, values: Any) -> Any:
        """`activation_checkpointing`, a bool, was its name up to 0.1.0: configurations of finished runs have it."""
        if not isinstance(values, dict) or "activation_checkpointing" not in values:
            return values
        if "recompute" in values:
            raise ValueError("model.activation_checkpointing is now model.recompute: give the latter alone")
        others = {key: value for key, value in values.items() if key != "activation_checkpointing"}
        return others | {"recompute": "blocks" if values["activation_checkpointing"] else "none"}


class TaskSection(Section):
    """The `task:` section of a run. Each task brings its own subclass, with its settings (pretrain/tasks/task.py)."""

    name: str = Field(description="pretraining, classification, or MODULE:CLASS of a task outside this package")

    @classmethod
    def augmentation(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of `data.augmentation` that these settings of the task bring; what a configuration gives goes before."""
        return {}


class OptimizerConfig(Section):
    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: matrices by Muon at AdamW's lr and decay, the rest by AdamW; ZeRO stages 0 to 2"
    )
    lr: float = Field(1e-3, ge=0, description="peak lr at `lr_batch`; scaled linearly with the global batch")
    lr_batch: int | None = Field(None, ge=1, description="batch that `lr` is stated for; None: no scaling")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1, description="of muon")
    weight_decay: float = Field(0.05, ge=0, description="on matrices only: norms, biases and scales have none")
    layer_decay: float = Field(1.0, gt=0, le=1, description="lr multiplier per block, from the head down")
    offset_lr_scale: float = Field(1.0, gt=0, description="lr multiplier of the projections that offsets come from")
    clip_grad: float | None = Field(1.0, gt=0)


class ScheduleConfig(Section):
    name: Literal["cosine", "constant", "poly", "step"] = Field(
        "cosine", description="poly: linear to the end; step: a tenth from each milestone on"
    )
    steps: int | None = Field(None, ge=1, description="length of the run; or give `epochs`")
    epochs: float | None = Field(None, gt=0)
    warmup_steps: int | None = Field(None, ge=0)
    warmup_epochs: float | None = Field(None, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    milestones: list[float] = Field([2 / 3, 11 / 12], description="of `step`: shares of the run, as 8 of 12 epochs")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of schedule.steps and schedule.epochs")
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ValueError("give at most one of schedule.warmup_steps and schedule.warmup_epochs")
        return self


class EmaConfig(Section):
    enabled: bool = True
    decay: float = Field(0.9999, ge=0, lt=1, description="of the evaluation weights, where no teacher runs")
    teacher_start: float = Field(0.995, ge=0, lt=1, description="momentum of the teacher at step 0, cosine to the end")
    teacher_end: float = Field(0.9995, ge=0, lt=1)


class PolicyConfig(Section):
    """What happens when a step or a rank goes wrong."""

    max_skipped: int = Field(
        10, ge=0, description="steps not applied in a row, non-finite or spikes, before a rollback"
    )
    spike_factor: float | None = Field(
        5.0, gt=1, description="loss over its running median, and 1 above it, that counts as a spike; null: none does"
    )
    rollbacks: int = Field(3, ge=0, description="returns to a checkpoint, in a window, before the run gives up (4)")
    rollback_window: int = Field(2000, ge=1, description="steps in which rollbacks count together")
    hang_seconds: float = Field(1800.0, gt=0, description="a step longer than this dumps all stacks and ends the run")
    grace_seconds: float = Field(60.0, gt=0, description="time allowed to save after a stop request")


class TrainingConfig(Section):
    seed: int = 0
    batch_size: int = Field(256, ge=1, description="global batch of one optimizer step")
    accumulation: int = Field(1, ge=1, description="micro-batches of one step")
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    reduce_gradients: Literal["fp32", "compute"] = Field(
        "fp32", description="type in which gradients are summed over ranks; compute: that of forward and backward"
    )
    secondary_partition: int | None = Field(
        None,
        ge=2,
        description="ranks, as those of a node, that hold the parameters of stage 3 once more among them, so that the "
        "backward pass gathers there (hpZ, of ZeRO++)",
    )
    offload_optimizer: bool = False
    offload_parameters: bool = False
    offload_folder: str | None = Field(
        None,
        description="folder on a local disk: Adam's moments and the EMA lie there, in mapped files; a step then "
        "waits until a save is written",
    )
    ema: EmaConfig = EmaConfig()
    policy: PolicyConfig = PolicyConfig()
    log_every: int = Field(10, ge=1)
    wandb: str | None = Field(None, description="Weights & Biases project; needs the extra `wandb`")
    on_event: str | None = Field(None, description="shell command that gets each event of note, as JSON on its input")
    profile: str | None = Field(None, pattern=r"^\d+:\d+$", description="steps FIRST:LAST to trace")
    stop_after: int | None = Field(None, ge=1, description="stop (75) after this step, as a signal would")
    allow_changes: list[str] = Field([], description="keys that a resumed run may change: --allow-change")

    @model_validator(mode="after")
    def _secondary_at_stage_3(self) -> Self:
        if self.secondary_partition is not None and (self.zero_stage != 3 or self.offload_parameters):
            raise ValueError(
                "training.secondary_partition is of training.zero_stage 3, which alone cuts parameters, and keeps them "
                "on the device: leave training.offload_parameters out"
            )
        return self

    @field_validator("profile", mode="before")
    @classmethod
    def _minutes_and_seconds(cls, value: Any) -> Any:
        """YAML reads 10:13 without quotes as 10 * 60 + 13; below 60 a number is no such pair."""
        return f"{value // 60}:{value % 60}" if type(value) is int and value >= 60 else value


class CheckpointConfig(Section):
    every_steps: int | None = Field(1000, ge=1)
    every_minutes: float | None = Field(None, gt=0)
    keep: int = Field(3, ge=1, description="newest checkpoints kept")
    keep_every: int | None = Field(None, ge=1, description="steps whose checkpoints (milestones) are kept for good")
    keep_gigabytes: float | None = Field(
        None, gt=0, description="of milestones at most: they are thinned, spread over the run; null: no limit"
    )
    copy_to: str | None = Field(None, description="folder or URL (s3://...): every complete checkpoint is copied there")
    keep_copies: int | None = Field(None, ge=1, description="newest copies that stay there; null: all")
    fast_folder: str | None = Field(
        None,
        description="folder on a disk of each node, as /local/$USER: a save lands there first and is copied into the "
        "run's folder in the background",
    )
    asynchronous: bool = True


class EvaluationConfig(Section):
    """Scores while the run trains: of the EMA weights, on all ranks; `best` names the checkpoint that was best."""

    every_steps: int | None = Field(None, ge=1, description="steps between two, and after the last; null: none")
    data: str | None = Field(None, description="folder of the held-out set")
    name: str | None = Field(None, description="evaluation of the task, as zero-shot; null: that of its main score")
    score: str | None = Field(None, description="of the evaluation, that chooses the best; null: its main one")
    batch_size: int = Field(64, ge=1, description="pictures at once on a rank")

    @model_validator(mode="after")
    def _on_a_set(self) -> Self:
        if self.every_steps is not None and self.data is None:
            raise ValueError("evaluation.every_steps needs a set: give evaluation.data")
        return self


class RunConfig(Section):
    """A whole run. `deepspeed` is merged last into the derived DeepSpeed JSON.

    `task` is narrowed to the section of the named task by `parse_config`, which is how a configuration is made.
    """

    model: ModelConfig = ModelConfig()
    task: TaskSection
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    deepspeed: dict[str, Any] = Field({}, description="raw DeepSpeed keys that have no name here")
    initialize_from: str | None = Field(None, description="checkpoint, run or weights file to start the model from")

    @model_validator(mode="after")
    def _muon_on_whole_matrices(self) -> Self:
        training = self.training
        if self.optimizer.name == "muon":
            if training.zero_stage == 3:
                raise ValueError(
                    "optimizer.name muon needs training.zero_stage 0, 1 or 2: stage 3 cuts every matrix over all "
                    "ranks, and Muon orthogonalises whole ones"
                )
            if training.offload_optimizer or training.offload_folder is not None:
                raise ValueError(
                    "optimizer.name muon takes neither training.offload_optimizer nor training.offload_folder: its "
                    "products of matrices would run on the host"
                )
        return self

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        try:
            rows_per_rank(self.training.batch_size, self.training.accumulation, 1)
        except UserError as error:
            raise ValueError(str(error)) from None
        return self
