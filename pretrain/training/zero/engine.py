"""DeepSpeed behind five verbs: forward, backward, set the lr, step or not, and the fragments that a rank holds.

All that depends on the ZeRO stage or on DeepSpeed's habits is here and in `fragments.py`; the loop knows neither.
"""

import importlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data_pipeline.reading import Batch, Targets
from pretrain.configuration.schema import OptimizerConfig, TrainingConfig
from pretrain.tasks.module import LossOutput, StepKeys, TaskModule, TeacherTargets
from pretrain.training.distributed import DistributedContext
from pretrain.training.logging.meter import count_flops
from pretrain.training.parameter_groups import ParameterGroup
from pretrain.training.zero.deepspeed_config import derive
from pretrain.training.zero.fragments import Fragment, held_fragments, owned_fragments, publish
from pretrain.training.zero.optimizer import build_optimizer

R = TypeVar("R")
LossScaler = Any  # of DeepSpeed, which has no types


def import_deepspeed() -> ModuleType:
    """DeepSpeed, over torch's process group where there is one; without building an operator at start and without its
    start-up log.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    from deepspeed.utils import logger

    deepspeed: ModuleType = importlib.import_module("deepspeed")

    logger.setLevel(logging.ERROR)
    # DeepSpeed imports Muon, unused here, whose functions are decorated with torch.compile: that alone imports the
    # whole compiler, 1.5 s of every rank's start. So it is imported once with a decorator that does nothing.
    compile_function = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else (lambda function: function)  # type: ignore
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    except ImportError:
        pass  # another version keeps it elsewhere: only slower
    finally:
        torch.compile = compile_function
    # Without this the shared-memory collectives are compiled at start: a minute, and a failure without ninja.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return deepspeed


def compute_dtype(precision: str) -> torch.dtype:
    """The type of forward and backward. precision: fp32, bf16, fp16."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, whether ZeRO-3 has cut it or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def settings_for(
    module: nn.Module,
    training: TrainingConfig,
    clip_grad: float | None,
    given: Mapping[str, Any],
    context: DistributedContext,
) -> dict[str, Any]:
    """The DeepSpeed JSON of this module. given: the raw keys of the configuration's `deepspeed:` section."""
    trainable = sum(math.prod(full_shape(p)) for p in module.parameters() if p.requires_grad)
    cuda = context.device.type == "cuda"
    return derive(training, clip_grad, given, world_size=context.world_size, parameters=trainable, cuda=cuda)


def gather_by_region(module: nn.Module) -> None:
    """At ZeRO stage 3, have each compiled region's own hooks gather all parameters inside it, and nothing below hooked:
    hooks within would break its graph.

    DeepSpeed's own leaf modules reduce gradients after every call of a module, and so may be called once a step only.
    """
    from pretrain.models.compilation import regions  # imports the models

    register = import_deepspeed().zero.register_external_parameter
    for region in regions(module):
        for child in region.modules():
            if child is not region:
                child._forward_pre_hooks.clear()
                child._forward_hooks.clear()
                for parameter in child.parameters(recurse=False):
                    register(region, parameter)


class Engine:
    """The module under ZeRO. `held` and `owned` are the rank's fragments; `compute_dtype` is that of forward and
    backward.

    settings: the DeepSpeed JSON (`settings_for`). compiled: are regions of the module compiled (model.compile)?
    """

    def __init__(
        self,
        module: TaskModule,
        groups: Sequence[ParameterGroup],
        settings: dict[str, Any],
        *,
        optimizer: OptimizerConfig,
        training: TrainingConfig,
        compiled: bool,
        context: DistributedContext,
    ) -> None:
        deepspeed = import_deepspeed()
        parameters = dict(module.named_parameters())
        points = [name for name, parameter in parameters.items() if full_shape(parameter) == ()]
        if points:  # DeepSpeed broadcasts a byte view, which a 0-d tensor has not
            raise ValueError(
                f"parameters need at least one dimension under DeepSpeed: {points[0]}; make it of shape [1]"
            )
        self.module, self.stage, self.settings = module, training.zero_stage, settings
        self._clip = optimizer.clip_grad
        self._clips_here = self.stage == 0 and training.precision == "fp32"
        self._optimizer = build_optimizer(groups, parameters, optimizer)
        self._lr_scales = [group.lr_scale for group in groups]
        self._optimizer.veto = True  # of the dummy step that some stages take while they build
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=self._optimizer, config=settings)
        self._optimizer.veto = False
        if self.stage == 3 and compiled:
            gather_by_region(module)
        self._buffers_before = [(b, b.clone()) for _, b in self.buffers()]
        self._forward_flops: float | None = None
        self._target_flops = 0.0
        self._micro_rows, self.compiled = settings["train_micro_batch_size_per_gpu"], compiled
        folder = training.offload_folder
        self.offload_folder = Path(folder) if folder is not None else None
        self.held, self._masters = held_fragments(self._engine, module, self.offload_folder)
        self.owned: list[Fragment] = owned_fragments(self.held, rank=context.rank, world_size=context.world_size)
        self._optimizer.lay_out(self.held, context)
        self.compute_dtype = compute_dtype(training.precision)

    def __call__(
        self, batch: Batch[Targets], keys: StepKeys, teacher_targets: TeacherTargets | None, measure: bool
    ) -> LossOutput:
        """The module's forward pass; the first one is counted (`flops_per_sample`)."""
        inputs = (batch, keys, teacher_targets, measure)
        if self._forward_flops is None and not self.compiled:
            result, self._forward_flops = self._counted(lambda: self._engine(*inputs))
        else:
            if self._forward_flops is None:
                # One more pass counts what is compiled, without gradient, so that it holds no activations.
                with torch.no_grad(), torch.random.fork_rng():
                    _, self._forward_flops = self._counted(lambda: self.module(*inputs))
                self._settle_buffers(keep=False)
            result = self._engine(*inputs)
        assert isinstance(result, LossOutput), "a task's forward pass returns a LossOutput"
        return result

    def teacher_targets(self, teacher: nn.Module, batch: Batch[Targets], keys: StepKeys) -> TeacherTargets:
        """The module's targets, by its teacher, without gradient; the first ones are counted too."""
        call = partial(self.module.teacher_targets, teacher, batch, keys)
        if self._forward_flops is None:
            result, self._target_flops = self._counted(call)
            return result
        return call()

    def _counted(self, call: Callable[[], R]) -> tuple[R, float]:
        """In eager mode: a compiled graph hides its operations from the counter."""
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with eager:
            return count_flops(call, self._micro_rows)

    @property
    def flops_per_sample(self) -> float | None:
        """FLOPs of one training step: forward, twice that backward, the teacher forward only. None before the
        first forward pass.
        """
        return None if self._forward_flops is None else 3.0 * self._forward_flops + self._target_flops

    def backward(self, loss: Tensor) -> None:
        """Accumulates; the gradient of the step is the mean over micro-batches and ranks."""
        if self._scaler is not None and self.stage == 0:
            # DeepSpeed 0.19 divides the gradients by the loss scale there, but does not multiply the loss by it, so
            # that it would clip nothing: whatever it does, this is what must come in.
            scale = self._loss_scale / self._engine.gradient_accumulation_steps()
            loss.register_hook(lambda gradient: torch.full_like(gradient, scale))
        self._engine.backward(loss)
        self._last_micro = self._engine.is_gradient_accumulation_boundary()
        if not self._last_micro:
            self._engine.step()

    def set_lr(self, lr: float) -> None:
        for group, scale in zip(self._optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = lr * scale

    def step(self, *, apply: bool) -> tuple[bool, float]:
        """Clip and update, or throw the gradients away, and what the batch did to the statistics in buffers with them.
        Returns (applied, gradient norm before clipping); equal on all ranks.
        """
        norm = math.nan
        if self._clips_here:
            limit = self._clip if self._clip is not None else math.inf
            gradients = [p for p in self.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.clip_grad_norm_(gradients, limit))
            apply = apply and math.isfinite(norm)
        scale = self._loss_scale
        self._optimizer.veto = not apply
        try:
            self._engine.step()
        finally:
            self._optimizer.veto = False
        if not self._clips_here:
            norm = float(self._engine.get_global_grad_norm() or 0.0)
            # DeepSpeed gives it under the loss scale at stage 0, over the scale that the step has moved to at stage 3.
            norm /= {0: scale, 3: scale / self._loss_scale}.get(self.stage, 1.0)
        applied = apply and self._engine.was_step_applied()
        self._settle_buffers(keep=applied)
        return applied, norm

    def buffers(self) -> list[tuple[str, Tensor]]:
        """The module's persistent buffers, such as batch statistics: equal on all ranks."""
        persistent = self.module.state_dict(keep_vars=True).keys()
        return [(name, buffer.detach()) for name, buffer in self.module.named_buffers() if name in persistent]

    @torch.no_grad()
    def _settle_buffers(self, *, keep: bool) -> None:
        for live, before in self._buffers_before:
            if keep:
                before.copy_(live)
            else:
                live.copy_(before)

    def publish(self) -> None:
        """After masters, states and buffers were written from outside (a restored checkpoint). Collective."""
        publish(self._engine, self.module)
        self._optimizer.settle()
        self._settle_buffers(keep=True)

    @property
    def adam_steps(self) -> float:
        """Updates applied so far, as AdamW's bias correction counts them."""
        counted = [self._optimizer.state[master] for master in self._masters]
        return next((float(state["step"]) for state in counted if "step" in state), 0.0)

    @adam_steps.setter
    def adam_steps(self, value: float) -> None:
        for master in self._masters:
            if "step" in (state := self._optimizer.state[master]):  # Muon counts none
                state["step"].fill_(value)

    @property
    def _scaler(self) -> LossScaler | None:
        """What keeps fp16's loss scale: `loss_scaler` at stages 1 to 3, `loss_scale_config` at stage 0."""
        if self.compute_dtype != torch.float16:
            return None
        zero = self._engine.optimizer
        return getattr(zero, "loss_scaler", None) or getattr(zero, "loss_scale_config", None)

    @property
    def _loss_scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.cur_scale)

    def scaler_state(self) -> dict[str, float]:
        """The counters of fp16's dynamic loss scale; empty elsewhere."""
        found = vars(self._scaler) if self._scaler is not None else {}
        return {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            if hasattr(self._scaler, name):  # a scaler of another stage has a few fields of its own
                setattr(self._scaler, name, value)

    def close(self) -> None:
        self._engine.destroy()
