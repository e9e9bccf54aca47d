"""The training loop. Everything that a step needs is made in `rank.py`; everything about ZeRO is behind `engine`.

for every step:
    lr -> micro-batches (teacher's targets, loss, gradients) -> agree, decide -> update -> EMA -> log -> save
       -> validate? -> stop?
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.reading import Batch, Targets
from data_pipeline.reading.order.course import Segment, go_on
from pretrain.configuration.schema import TrainingConfig
from pretrain.tasks.module import StepKeys
from pretrain.tasks.task import BatchReader
from pretrain.training.agreement import Agreed, Said, begin_agreement
from pretrain.training.checkpoint.checkpointer import Checkpointer
from pretrain.training.distributed import DistributedContext, seed_step
from pretrain.training.logging.kinds import EventKind
from pretrain.training.logging.meter import Meter
from pretrain.training.logging.rank_times import RankTimes
from pretrain.training.logging.record import EventLog
from pretrain.training.logging.run_log import RunLog
from pretrain.training.safeguards.bad_samples import BadSampleMonitor
from pretrain.training.safeguards.interruption import Interruption
from pretrain.training.safeguards.policy import DivergencePolicy, StepDecision
from pretrain.training.safeguards.watchdog import Watchdog
from pretrain.training.schedule import Schedule, ema_decay
from pretrain.training.segments import as_json, from_json, write_segments
from pretrain.training.validation import Validation
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
    times: RankTimes
    interruption: Interruption
    watchdog: Watchdog
    events: EventLog
    log: RunLog
    bad_samples: BadSampleMonitor
    validation: Validation | None = None


def train(parts: LoopParts, step: int, segments: Sequence[Segment]) -> bool:
    """Train from `step` to the end. True: the end was reached; False: stopped on request. Saved in either case.

    segments: of the run, up to `step` and from there on.

    Raises GaveUpError by the policy, BadDataError above data.max_bad_rate, on all ranks.
    """
    total = parts.schedule.total_steps
    batches = parts.reader.batches(step, segments)
    if parts.teacher is not None:
        parts.teacher.refresh()
    parts.meter.pause()
    parts.watchdog.heartbeat()
    stopping = _asked_before(parts, step) or not _validated(parts, step)
    while step < total and not stopping:
        if step in parts.policy.skipped_steps:
            step += 1
            batches = parts.reader.batches(step, segments)
            continue
        decision, agreed = _one_step(parts, step, batches)
        if agreed.stop:
            parts.interruption.request("request on another rank")
        stopping = agreed.stop
        if decision is StepDecision.ROLL_BACK:
            step, segments = _roll_back(parts, step, segments)
            batches = parts.reader.batches(step, segments)
            continue
        step += 1
        parts.checkpointer.advance(written=agreed.written, failed=agreed.failed)
        validates = parts.validation is not None and parts.validation.due(step)
        if validates or (step < total and agreed.due):
            parts.checkpointer.save(step, _state(parts, segments))
        parts.watchdog.heartbeat()
        if validates and not stopping:
            stopping = not _validated(parts, step)
        parts.log.step_ended(step)
    parts.checkpointer.save(step, _state(parts, segments))
    saved = parts.checkpointer.wait_or_raise()
    parts.bad_samples.check_together()  # the last step's samples
    unscored = parts.validation is not None and parts.validation.due(step)
    return saved and step >= total and not unscored


def _validated(parts: LoopParts, step: int) -> bool:
    """Score the weights where that is due, of a step whose checkpoint is there or on its way. False: a request to stop
    came meanwhile, and the next start does it. Collective.
    """
    if parts.validation is None or not parts.validation.due(step):
        return True
    score = parts.validation.validate(step, parts.checkpointer.wait)
    if score is None:
        parts.interruption.request("request on another rank")
        return False
    parts.log.validated(step, parts.validation.title, score)
    parts.meter.pause()
    return True


def _state(parts: LoopParts, segments: Sequence[Segment]) -> dict[str, object]:
    """What a checkpoint keeps of the loop itself. Collective."""
    replaced = parts.bad_samples.state()
    states = {"policy": parts.policy.state(), "meter": parts.meter.state(), "replaced": replaced}
    return states | {"segments": as_json(segments)}


def _one_step(parts: LoopParts, step: int, batches: Iterator[Batch[Targets]]) -> tuple[StepDecision, Agreed]:
    """One optimizer step on one global batch: what became of it, and what the ranks have agreed on."""
    settings, schedule, engine = parts.settings, parts.schedule, parts.engine
    seed_step(settings.seed, step, parts.context.rank)
    lr = schedule.lr(step)
    engine.set_lr(lr)
    logged = (step + 1) % settings.log_every == 0 or step + 1 == schedule.total_steps
    parts.times.started()
    for micro in range(settings.accumulation):
        with parts.meter.waiting(), parts.times.waiting():
            batch = next(batches)
        parts.times.computing()
        batch = batch.to(parts.context.device)
        keys = StepKeys(settings.seed, step, micro)
        taught = None
        if parts.teacher is not None:
            parts.teacher.ready()
            taught = engine.teacher_targets(parts.teacher.module, batch, keys)
        out = engine(batch, keys, taught, logged)
        parts.meter.add(out.total, out.parts)
        last = micro + 1 == settings.accumulation
        parts.times.forwarded(last=last)
        if last:
            agreement = begin_agreement(parts.context, parts.meter.micro_loss(), _said(parts, step))
        engine.backward(out.total)
        if logged:
            parts.meter.measure(out.metrics)  # of which the backward pass has found some

    agreed = agreement()
    parts.bad_samples.check(agreed.seen, agreed.bad)
    loss = agreed.loss
    decision = parts.policy.decide(step, loss)
    applied, norm = engine.step(apply=decision is StepDecision.APPLY)
    if applied and parts.ema is not None:
        parts.ema.update(ema_decay(step, schedule.total_steps, settings.ema, teacher=parts.teacher is not None))
        if parts.teacher is not None:
            parts.teacher.refresh()
    decision = parts.policy.record(step, loss, norm, applied)
    if decision is not StepDecision.APPLY and parts.context.leader:
        parts.events(EventKind.STEP_NOT_APPLIED, step=step, loss=loss, grad_norm=norm, verdict=decision.value)
    parts.meter.end_step(applied=applied, loss=loss, norm=norm)
    if logged:
        values = parts.meter.collect(lr, engine.flops_per_sample)
        parts.log.write(step + 1, values | parts.times.collect() | parts.bad_samples.metrics(step + 1))
    return decision, agreed


def _said(parts: LoopParts, step: int) -> Said:
    """This rank's part of the agreement in step `step`, which ends with step + 1 steps done."""
    _note_requests(parts, step + 1)
    written, failed = parts.checkpointer.progress()
    seen, bad = parts.bad_samples.counts()
    return Said(parts.interruption.requested, parts.checkpointer.due(step + 1), seen, bad, written, failed)


def _note_requests(parts: LoopParts, done: int) -> None:
    if parts.context.leader:
        parts.interruption.read_stop_file(parts.checkpointer.run)
    limit = parts.settings.stop_after
    if limit is not None and done >= limit:
        parts.interruption.request("training.stop_after")


def _asked_before(parts: LoopParts, step: int) -> bool:
    """Was any rank asked to stop while the run was starting? Collective."""
    _note_requests(parts, step)
    if parts.context.sum([float(parts.interruption.requested)])[0] == 0:
        return False
    parts.interruption.request("request on another rank")
    return True


def _roll_back(parts: LoopParts, step: int, segments: Sequence[Segment]) -> tuple[int, Sequence[Segment]]:
    """Load the checkpoint from before the drift; the step to go on from, and the segments that the run then has: a
    change of batch or weights that lies between holds from there on. Without one, the offending batch is merely
    skipped.
    """
    rollback = parts.policy.roll_back(step)
    parts.checkpointer.wait()
    state = parts.checkpointer.restore(before=rollback.before)
    to = int(state["step"]) if state is not None else None
    if parts.context.leader:
        parts.events(EventKind.ROLLBACK, step=step, to=to, passed_over=list(rollback.passed_over))
    if state is not None:
        parts.policy.load(state["policy"] | {"outcomes": []})  # bad steps of before count for no further rollback
        parts.log.rewind(int(state["step"]))
        if parts.validation is not None:
            parts.validation.rewind(int(state["step"]))
        parts.meter.load(state.get("meter"))
        if parts.teacher is not None:
            parts.teacher.refresh()
    parts.watchdog.heartbeat()
    parts.meter.pause()
    if state is None:
        return step + 1, segments
    now = segments[-1]
    segments = go_on(from_json(state["segments"]), int(state["step"]), now.batch_size, now.weights)
    if parts.context.leader:
        write_segments(parts.checkpointer.run, segments)
    return int(state["step"]), segments
