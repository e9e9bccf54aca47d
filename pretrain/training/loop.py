"""The training loop. Everything that a step needs is made in `rank.py`; everything about ZeRO is behind `engine`.

for every step:
    lr -> micro-batches (teacher's targets, loss, gradients) -> decide -> update -> EMA -> log -> save -> stop?
"""

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.reading import Batch, Targets
from pretrain.configuration.schema import TrainingConfig
from pretrain.tasks.module import StepKeys
from pretrain.tasks.task import BatchReader
from pretrain.training.checkpoint.checkpointer import Checkpointer
from pretrain.training.distributed import DistributedContext, seed_step
from pretrain.training.logging.kinds import EventKind
from pretrain.training.logging.meter import Meter
from pretrain.training.logging.record import EventLog
from pretrain.training.logging.run_log import RunLog
from pretrain.training.safeguards.bad_samples import BadSampleMonitor
from pretrain.training.safeguards.interruption import Interruption
from pretrain.training.safeguards.policy import DivergencePolicy, StepDecision
from pretrain.training.safeguards.watchdog import Watchdog
from pretrain.training.schedule import Schedule, ema_decay
from pretrain.training.zero.ema import Ema
from pretrain.training.zero.engine import Engine
from pretrain.training.zero.teacher import PartitionedTeacher, WholeTeacher


@dataclass(frozen=True)
class LoopParts:
    """What one rank needs to train."""

    settings: TrainingConfig
    schedule: Schedule
    reader: BatchReader
    engine: Engine
    ema: Ema | None
    teacher: WholeTeacher | PartitionedTeacher | None
    checkpointer: Checkpointer
    policy: DivergencePolicy
    context: DistributedContext
    meter: Meter
    interruption: Interruption
    watchdog: Watchdog
    events: EventLog
    log: RunLog
    bad_samples: BadSampleMonitor


def train(parts: LoopParts, step: int) -> bool:
    """Train from `step` to the end. True: the end was reached; False: stopped on request. Saved in either case.

    Raises GaveUpError by the policy, BadDataError above data.max_bad_rate, on all ranks.
    """
    total = parts.schedule.total_steps
    batches = parts.reader.batches(step)
    if parts.teacher is not None:
        parts.teacher.refresh()
    parts.meter.pause()
    parts.watchdog.heartbeat()
    while step < total and not _stop_agreed(parts, step):
        if step in parts.policy.skipped_steps:
            step += 1
            batches = parts.reader.batches(step)
            continue
        decision = _one_step(parts, step, batches)
        if decision is StepDecision.ROLL_BACK:
            step = _roll_back(parts, step)
            batches = parts.reader.batches(step)
            continue
        step += 1
        parts.checkpointer.poll()
        if step < total and parts.checkpointer.due(step):
            parts.checkpointer.save(step, _state(parts))
        parts.watchdog.heartbeat()
        parts.log.step_ended(step)
    parts.checkpointer.save(step, _state(parts))
    saved = parts.checkpointer.wait_or_raise()
    parts.bad_samples.check_together()  # the last step's samples
    return saved and step >= total


def _state(parts: LoopParts) -> dict[str, object]:
    """What a checkpoint keeps of the loop itself. Collective."""
    return {"policy": parts.policy.state(), "meter": parts.meter.state()}


def _one_step(parts: LoopParts, step: int, batches: Iterator[Batch[Targets]]) -> StepDecision:
    """One optimizer step on one global batch."""
    settings, schedule, engine = parts.settings, parts.schedule, parts.engine
    seed_step(settings.seed, step, parts.context.rank)
    lr = schedule.lr(step)
    engine.set_lr(lr)
    logged = (step + 1) % settings.log_every == 0 or step + 1 == schedule.total_steps
    for micro in range(settings.accumulation):
        with parts.meter.waiting():
            batch = next(batches)
        batch = batch.to(parts.context.device)
        keys = StepKeys(settings.seed, step, micro)
        taught = engine.teacher_targets(parts.teacher.module, batch, keys) if parts.teacher is not None else None
        out = engine(batch, keys, taught, logged)
        engine.backward(out.total)
        parts.meter.add(out.total, out.parts, out.metrics if logged else {})

    loss = parts.meter.loss()
    decision = parts.policy.decide(step, loss)
    applied, norm = engine.step(apply=decision is StepDecision.APPLY)
    if applied and parts.ema is not None:
        parts.ema.update(ema_decay(step, schedule.total_steps, settings.ema, teacher=parts.teacher is not None))
        if parts.teacher is not None:
            parts.teacher.refresh()
    if decision is not StepDecision.ROLL_BACK:
        decision = parts.policy.record(step, loss, applied)
    if decision is not StepDecision.APPLY and parts.context.leader:
        parts.events(EventKind.STEP_NOT_APPLIED, step=step, loss=loss, grad_norm=norm, verdict=decision.value)
    parts.meter.end_step(applied=applied, norm=norm)
    if logged:
        values = parts.meter.collect(lr, engine.flops_per_sample)
        parts.log.write(step + 1, values | parts.bad_samples.metrics(step + 1))
    return decision


def _roll_back(parts: LoopParts, step: int) -> int:
    """Load the last good checkpoint; the step to go on from. Without one, the offending batch is merely skipped."""
    offending = parts.policy.roll_back()
    parts.checkpointer.wait()
    state = parts.checkpointer.restore()
    if parts.context.leader:
        parts.events(EventKind.ROLLBACK, step=step, to=state["step"] if state else None, passed_over=offending)
    if state is not None:
        parts.log.rewind(int(state["step"]))
        parts.meter.load(state.get("meter"))
        if parts.teacher is not None:
            parts.teacher.refresh()
    parts.watchdog.heartbeat()
    parts.meter.pause()
    return int(state["step"]) if state else step + 1


def _stop_agreed(parts: LoopParts, step: int) -> bool:
    """A request that reached any rank stops all of them at the same step; so does bad data."""
    if parts.context.leader:
        parts.interruption.read_stop_file(parts.checkpointer.run)
    limit = parts.settings.stop_after
    if limit is not None and step >= limit:
        parts.interruption.request("training.stop_after")
    any_asked, seen, bad = parts.context.sum([float(parts.interruption.requested), *parts.bad_samples.counts()])
    parts.bad_samples.check(seen, bad)
    if any_asked == 0:
        return False
    parts.interruption.request("request on another rank")
    return True
