"""One rank's whole life: meet the others, build or resume, train, leave together.

RUN/  config.yaml  environment.json  metrics.jsonl  events.jsonl  tensorboard/  checkpoints/  policy.json  stacks-*.txt
"""

import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from data_pipeline.errors import GaveUpError, UserError
from pretrain.configuration import RunConfig, dump_config
from pretrain.training.account import Account
from pretrain.training.building import build
from pretrain.training.checkpointer import Checkpointer
from pretrain.training.checkpoints import complete_checkpoints
from pretrain.training.ema import Ema
from pretrain.training.engine import Engine, full_shape
from pretrain.training.interruption import STOP_FILE, Interruption
from pretrain.training.loop import Job, train
from pretrain.training.meter import Meter
from pretrain.training.parameter_groups import Backbone, parameter_groups
from pretrain.training.policy import Policy
from pretrain.training.processes import Processes, join
from pretrain.training.profiling import Profiler
from pretrain.training.progress import Progress
from pretrain.training.record import CONFIG, ENVIRONMENT, Events, MetricsLog, environment
from pretrain.training.resume import check_same_run
from pretrain.training.schedule import make_plan
from pretrain.training.shard_file import write_durably
from pretrain.training.teacher import build_teacher
from pretrain.training.watchdog import START_UP_SECONDS, Watchdog

DONE, STOPPED = 0, 75


@dataclass(frozen=True)
class Factories:
    """Where task and reader come from; tests give small ones."""

    task: Callable[..., Any]  # (config, classes=) -> nn.Module
    reader: Callable[..., Any]  # (config, processes, events, run) -> reader
    keys: Callable[..., Any]  # (seed, step, micro, measure)


def standard_factories(still_starting: Callable[[], None] | None = None) -> Factories:
    from data_pipeline.reading import Reader
    from pretrain.objectives import StepKeys, build_task, build_tokenizer

    def reader(config: RunConfig, processes: Processes, events: Events, run: Path) -> Any:
        return Reader(
            config.data,
            tokenizer=build_tokenizer(config.data.context_length, config.objective.text.vocab_size),
            batch_size=config.training.batch_size,
            accumulation=config.training.accumulation,
            rank=processes.rank,
            world_size=processes.world_size,
            seed=config.training.seed,
            events=events,
            judge=False,
            beat=still_starting,
        )

    return Factories(build_task, reader, StepKeys)


def run(
    config: RunConfig,
    output: Path | str,
    *,
    initialize: Callable[[nn.Module], None] | None = None,
    factories: Factories | None = None,
) -> int:
    """Start or resume the run in `output`, whichever its content calls for; the exit code: 0 done, 75 stopped after
    saving.

    initialize: called with the fresh task, before anything is sharded, unless the run resumes: its chance to load
    weights. Raises UserError (2), BadDataError (3), GaveUpError (4).
    """
    interruption = Interruption().install()  # before the slow imports: a signal during start-up is kept
    try:
        return _run(config, Path(output), initialize, factories, interruption)
    finally:
        interruption.remove()


def _run(
    config: RunConfig,
    output: Path,
    initialize: Callable[[nn.Module], None] | None,
    factories: Factories | None,
    interruption: Interruption,
) -> int:
    processes = join(config.training.policy.hang_seconds + START_UP_SECONDS)  # longer than the watchdog waits
    lock = _open_run(output, config, processes)
    events = Events(output, processes.rank)
    policy_config = config.training.policy
    watchdog = Watchdog(
        output,
        processes.rank,
        policy_config.hang_seconds,
        policy_config.grace_seconds,
        lambda k, m: events(k, message=m),
    ).start()
    interruption.on_request = watchdog.stopping  # the grace runs from the request, not from the step's end
    if interruption.reason is not None:
        watchdog.stopping()
    reader = progress = None
    try:
        factories = factories or standard_factories(watchdog.still_starting)
        reader = factories.reader(config, processes, events, output)
        job, start = _build(config, output, initialize, factories, interruption, processes, events, watchdog, reader)
        progress, log, profiler = _observers(job, output, start)
        try:
            finished = train(job, start)
        finally:
            if log is not None:
                log.close()
            profiler.close()
        if processes.leader:
            events("done" if finished else "stopped", reason=interruption.reason)
            (output / STOP_FILE).unlink(missing_ok=True)
            what = "done" if finished else f"stopped ({interruption.reason}) and saved; the same command goes on"
            progress.say(f"{what}: {output}")
        processes.barrier()  # nobody leaves before everybody is done: a launcher ends the others at the first exit
        job.engine.close()
        return DONE if finished else STOPPED
    except Exception as error:
        kind = "gave_up" if isinstance(error, GaveUpError) else "failed"
        events(kind, message=str(error), error=type(error).__name__)
        raise
    finally:
        watchdog.close()
        if progress is not None:
            progress.close()
        if reader is not None:
            reader.close()
        if lock is not None:
            os.close(lock)


def _build(
    config: RunConfig,
    output: Path,
    initialize: Callable[[nn.Module], None] | None,
    factories: Factories,
    interruption: Interruption,
    processes: Processes,
    events: Events,
    watchdog: Watchdog,
    reader: Any,
) -> tuple[Job, int]:
    plan = make_plan(config, reader.epoch_samples)
    resuming = bool(complete_checkpoints(output))
    if initialize is None and config.initialize_from is not None:
        initialize = partial(_initialize_from, path=config.initialize_from, report=events, leader=processes.leader)
    built = build(
        config,
        partial(factories.task, config, classes=reader.num_classes),
        None if resuming else initialize,
        processes,
    )
    task = built.task
    image = getattr(task, "image", None)
    if config.model.activation_checkpointing and image is not None:
        image.set_grad_checkpointing(True)
    if config.model.compile:
        from pretrain.models.compilation import compile_regions  # imports the models

        compile_regions(task)
        if built.teacher is not None:
            compile_regions(built.teacher)
    names = task.teacher_names() if built.teacher is not None else []
    if task.teacher_names() and not config.training.ema.enabled:
        raise UserError(
            f"objective.preset {config.objective.preset!r} learns from a momentum teacher: "
            "set training.ema.enabled to true, or choose a preset without one (clip, supervised, simmim)"
        )
    shapes = {name: full_shape(p) for name, p in task.named_parameters() if p.requires_grad}
    groups = parameter_groups(shapes, config.optimizer, backbone_of(task))
    engine = Engine(task, config, groups, processes)
    built.start_exactly(engine.held)
    ema = Ema(engine.owned, engine.offload_folder) if config.training.ema.enabled else None
    teacher = None
    if built.teacher is not None and ema is not None:
        teacher = build_teacher(built.teacher, names, engine, ema, processes)
    checkpointer = Checkpointer(output, config, engine, ema, processes, events)
    policy = Policy(config.training.policy, output, leader=processes.leader)
    data = {"epoch_samples": reader.epoch_samples, "fingerprint": getattr(reader, "fingerprint", None)}
    state = checkpointer.restore()
    start = 0
    if state is not None:
        start = int(state["step"])
        policy.load(state["policy"])
        if state["data"] != data:
            raise UserError(
                f"{output} was trained on {state['data']['epoch_samples']} samples an epoch; data.sources now hold "
                f"{reader.epoch_samples}, or other ones: the order would differ. Name the same sets, or start a new run"
            )
    checkpointer.constant_state = {"data": data}
    if processes.leader:
        events("start" if state is None else "resume", step=start, ranks=processes.world_size, stage=engine.stage)
    job = Job(
        config=config,
        plan=plan,
        task=task,
        engine=engine,
        batches=reader.batches,
        make_keys=factories.keys,
        ema=ema,
        teacher=teacher,
        checkpointer=checkpointer,
        policy=policy,
        processes=processes,
        meter=Meter(processes, config.training.batch_size, config.training.precision),
        interruption=interruption,
        watchdog=watchdog,
        events=events,
        observe=lambda step, values: None,
        tick=lambda step: None,
        rewind=lambda step: None,
        account=Account(reader, processes, output, start),
    )
    return job, start


def _observers(job: Job, output: Path, start: int) -> tuple[Progress, MetricsLog | None, Profiler]:
    """Attach what watches the loop: metrics and progress on rank 0, collapse alarms, the profiler."""
    config, leader = job.config, job.processes.leader
    progress = Progress(job.plan.total_steps, start, shown=leader)
    log = MetricsLog(output, start, config.training.wandb, config.model_dump(mode="json")) if leader else None
    profiler = Profiler(config.training.profile, output, job.processes.rank)
    alarms = getattr(job.task, "alarms", None)

    def observe(step: int, values: dict[str, float]) -> None:
        if log is None:
            return
        log.write(step, values)
        progress.show(step, values["loss"], values["lr"])
        for alarm in alarms(values) if alarms is not None else ():
            job.events("alarm", step=step, message=alarm)

    job.observe, job.tick = observe, profiler.step
    if log is not None:
        job.rewind = log.rewind
    profiler.step(start)
    return progress, log, profiler


def _initialize_from(task: nn.Module, path: str, report: Events, leader: bool) -> None:
    from pretrain.training.initialize import initialize_from  # imports the models

    fresh = initialize_from(task, path)
    if leader:
        report("initialized", source=path, kept_fresh=fresh)


def backbone_of(task: nn.Module) -> Backbone | None:
    """What layer-wise decay needs to know of `task.image`."""
    image = getattr(task, "image", None)
    depths = getattr(image, "depths", None)
    if image is None or depths is None:
        return None
    third = image.stages[2]
    return Backbone("image.", tuple(depths), tuple(getattr(third, "post_norm_after", {})))


def _open_run(output: Path, config: RunConfig, processes: Processes) -> int | None:
    """Make the folder, lock it against a second run, check that this configuration may go on with what is there."""
    lock, problem = None, None
    if processes.leader:
        try:
            output.mkdir(parents=True, exist_ok=True)
            lock = os.open(output / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            check_same_run(output, config)
            write_durably(output / CONFIG, dump_config(config))
            about = environment(processes.world_size, processes.device.type) | {"time": time.time()}
            write_durably(output / ENVIRONMENT, json.dumps(about, indent=1))
        except BlockingIOError:
            problem = f"{output}: another process is training here; stop it, or name another --output"
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{output}: cannot write the run folder ({error.strerror or error}); name a writable --output"
    problems = [found for found in processes.gather(problem) if found]
    if problems:
        if lock is not None:
            os.close(lock)
        raise UserError(problems[0])
    return lock
