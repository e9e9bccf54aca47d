"""The algorithm. Everything that a step needs is made in `rank.py`; everything about ZeRO is behind `engine`.

for every step: rate -> micro-batches (targets, loss, gradients) -> judge -> update -> average -> log -> save -> stop?
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pretrain.configuration import RunConfig
from pretrain.training.account import Account
from pretrain.training.checkpointer import Checkpointer
from pretrain.training.ema import Ema
from pretrain.training.engine import Engine
from pretrain.training.interruption import Interruption
from pretrain.training.meter import Meter
from pretrain.training.policy import Policy, Verdict
from pretrain.training.processes import Processes, seed_step
from pretrain.training.record import Events
from pretrain.training.schedule import Plan, ema_decay
from pretrain.training.teacher import PartitionedTeacher, WholeTeacher
from pretrain.training.watchdog import Watchdog


@dataclass
class Job:
    """What one rank needs to train. `batches(step)` yields micro-batches from a step on; `make_keys` is StepKeys."""

    config: RunConfig
    plan: Plan
    task: Any  # nn.Module with targets()
    engine: Engine
    batches: Callable[[int], Iterator[Any]]
    make_keys: Callable[..., Any]
    ema: Ema | None
    teacher: WholeTeacher | PartitionedTeacher | None
    checkpointer: Checkpointer
    policy: Policy
    processes: Processes
    meter: Meter
    interruption: Interruption
    watchdog: Watchdog
    events: Events
    observe: Callable[[int, dict[str, float]], None]  # step, metrics: log, progress
    tick: Callable[[int], None]  # after every step: profiler
    rewind: Callable[[int], None]  # after a return to an earlier step: the log
    account: Account  # of samples


def train(job: Job, step: int) -> bool:
    """Train from `step` to the end. True: the end was reached; False: stopped on request. Saved in either case.

    Raises GaveUpError by the policy, BadDataError above data.max_bad_rate, on all ranks.
    """
    total = job.plan.total_steps
    batches = job.batches(step)
    if job.teacher is not None:
        job.teacher.refresh()
    job.meter.pause()
    job.watchdog.beat()
    while step < total and not _stop_agreed(job, step):
        if step in job.policy.passed_over:
            step += 1
            batches = job.batches(step)
            continue
        verdict = _one_step(job, step, batches)
        if verdict is Verdict.ROLL_BACK:
            step = _roll_back(job, step)
            batches = job.batches(step)
            continue
        step += 1
        job.checkpointer.poll()
        if step < total and job.checkpointer.due(step):
            job.checkpointer.save(step, {"policy": job.policy.state()})
        job.watchdog.beat()
        job.tick(step)
    job.checkpointer.save(step, {"policy": job.policy.state()})
    saved = job.checkpointer.wait_or_raise()
    job.account.judge_together()  # the last step's samples
    return saved and step >= total


def _one_step(job: Job, step: int, batches: Iterator[Any]) -> Verdict:
    """One optimizer step on one global batch."""
    training, plan, engine = job.config.training, job.plan, job.engine
    seed_step(training.seed, step, job.processes.rank)
    rate = plan.learning_rate(step)
    engine.set_learning_rate(rate)
    logged = (step + 1) % training.log_every == 0 or step + 1 == plan.total_steps
    for micro in range(training.accumulation):
        with job.meter.waiting():
            batch = next(batches)
        batch = batch.to(job.processes.device)
        keys = job.make_keys(training.seed, step, micro, logged)
        targets = engine.targets(job.teacher.module, batch, keys) if job.teacher is not None else None
        out = engine(batch, keys, targets)
        engine.backward(out.total)
        job.meter.add(out.total, out.parts, out.metrics if logged else {})

    loss = job.meter.loss()
    verdict = job.policy.judge(step, loss)
    applied, norm = engine.step(apply=verdict is Verdict.APPLY)
    if applied and job.ema is not None:
        job.ema.update(ema_decay(step, plan.total_steps, training.ema, teacher=job.teacher is not None))
        if job.teacher is not None:
            job.teacher.refresh()
    if verdict is not Verdict.ROLL_BACK:
        verdict = job.policy.record(step, loss, applied)
    if verdict is not Verdict.APPLY and job.processes.leader:
        job.events("step_not_applied", step=step, loss=loss, grad_norm=norm, verdict=verdict.value)
    job.meter.end_step()
    if logged:
        values = job.meter.collect(loss, rate, norm, engine.flops_per_sample)
        job.observe(step + 1, values | job.account.metrics(step + 1))
    return verdict


def _roll_back(job: Job, step: int) -> int:
    """Load the last good checkpoint; the step to go on from. Without one, the offending batch is merely passed over."""
    offending = job.policy.roll_back()
    job.checkpointer.wait()
    state = job.checkpointer.restore()
    if job.processes.leader:
        job.events("rollback", step=step, to=state["step"] if state else None, passed_over=offending)
    if state is not None:
        job.rewind(int(state["step"]))
        if job.teacher is not None:
            job.teacher.refresh()
    job.watchdog.beat()
    job.meter.pause()
    return int(state["step"]) if state else step + 1


def _stop_agreed(job: Job, step: int) -> bool:
    """A request that reached any rank stops all of them at the same step; so does bad data."""
    if job.processes.leader:
        job.interruption.read_stop_file(job.checkpointer.run)
    limit = job.config.training.stop_after
    if limit is not None and step >= limit:
        job.interruption.request("training.stop_after")
    asked = job.interruption.reason is not None
    any_asked, *samples = job.processes.sum([float(asked), *job.account.mine()])
    job.account.judge(samples)
    if any_asked == 0:
        return False
    job.interruption.request("request on another rank")
    job.watchdog.stopping()
    return True
