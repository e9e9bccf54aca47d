"""One rank's whole life: meet the others, build or resume, train, leave together.

    RUN/  config.yaml  environment.json  metrics.jsonl  events.jsonl  tensorboard/  checkpoints/  policy.json
          stacks-*.txt

`compose` is the one place where the configuration is taken apart: each part is given its own section there.
"""

import socket
import sys
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from torch import nn

from data_pipeline.errors import DONE, STOPPED, GaveUpError, UserError, first_ten
from data_pipeline.reading.order.course import Segment
from data_pipeline.reading.order.share import rows_per_rank
from pretrain.configuration import RunConfig, dump_config
from pretrain.configuration.schema import RecomputeBudget
from pretrain.tasks.module import TaskModule
from pretrain.tasks.task import BatchReader, ReaderOptions, module_of, task_of
from pretrain.training.checkpoint.checkpointer import Checkpointer
from pretrain.training.checkpoint.disk import complete_checkpoints
from pretrain.training.checkpoint.fast_folder import bring_over, fast_folder
from pretrain.training.checkpoint.trained_on import TrainedOn
from pretrain.training.distributed import DistributedContext, join, lost_a_partner
from pretrain.training.folder import open_run, record_start
from pretrain.training.logging.kinds import EventKind
from pretrain.training.logging.meter import Meter
from pretrain.training.logging.notifying import Notifier
from pretrain.training.logging.output import make_output_lenient
from pretrain.training.logging.rank_times import RankTimes
from pretrain.training.logging.record import EventLog
from pretrain.training.logging.run_log import RunLog
from pretrain.training.loop import LoopParts, train
from pretrain.training.parameter_groups import parameter_groups
from pretrain.training.safeguards.bad_samples import BadSampleMonitor, replaced_before
from pretrain.training.safeguards.interruption import STOP_FILE, Interruption
from pretrain.training.safeguards.policy import DivergencePolicy, read_policy
from pretrain.training.safeguards.watchdog import START_UP_SECONDS, Watchdog
from pretrain.training.schedule import resolve_schedule
from pretrain.training.segments import from_json, segments_of, write_segments
from pretrain.training.validation import Validation
from pretrain.training.zero.building import Built, Initialize, build
from pretrain.training.zero.ema import Ema
from pretrain.training.zero.engine import Engine, compute_dtype, full_shape, settings_for
from pretrain.training.zero.teacher import PartitionedTeacher, WholeTeacher, build_teacher


def run(
    config: RunConfig,
    output: Path | str,
    *,
    initialize: Initialize | None = None,
    interruption: Interruption | None = None,
) -> int:
    """Start or resume the run in `output`, whichever its content calls for; the exit code: 0 done, 75 stopped after
    saving.

    initialize: called with the fresh module, before anything is sharded, unless the run resumes: its chance to load
    weights. interruption: where a caller has caught signals already; by default they are caught from here on.
    Raises UserError (2), BadDataError (3), GaveUpError (4).
    """
    output, policy = Path(output), config.training.policy
    make_output_lenient()
    with ExitStack() as stack:
        if interruption is None:
            interruption = stack.enter_context(Interruption())
        context = join(policy.hang_seconds + START_UP_SECONDS)  # longer than the watchdog waits
        changes = stack.enter_context(open_run(output, config, context))
        command = config.training.on_event
        events = EventLog(output, context.rank, Notifier(command, output) if command is not None else None)
        watchdog = Watchdog(
            output,
            context.rank,
            policy.hang_seconds,
            policy.grace_seconds,
            lambda kind, message: events(kind, message=message),
            lambda: interruption.requested,
        ).start()
        try:
            options = ReaderOptions(
                config.training.batch_size,
                config.training.accumulation,
                context.rank,
                context.world_size,
                config.training.seed,
                events,
                watchdog.still_starting,
            )
            reader = stack.enter_context(closing(task_of(config).open_reader(config.data, options)))
            if (fast := config.checkpoint.fast_folder) is not None:
                bring_over(fast_folder(fast, output, context), output, context, events)
            parts, start, segments = compose(
                config, output, initialize, reader, context, events, watchdog, interruption
            )
            stack.callback(parts.log.progress.close)
            stack.callback(parts.checkpointer.abandon)
            if changes:
                events(EventKind.CONFIG_CHANGED, step=start, changes=changes)
            if context.leader:
                record_start(output, config, context, changes, start)
            try:
                finished = train(parts, start, segments)
            finally:
                parts.log.close()
            if context.leader:
                events(EventKind.DONE if finished else EventKind.STOPPED, reason=interruption.reason)
                (output / STOP_FILE).unlink(missing_ok=True)
                what = "done" if finished else f"stopped ({interruption.reason}) and saved; the same command goes on"
                parts.log.progress.say(f"{what}: {output}")
            if finished:
                parts.checkpointer.close(watchdog.heartbeat)
            context.barrier()  # nobody leaves before everybody is done: a launcher ends the others at the first exit
            parts.engine.close()
        except Exception as error:
            kind = EventKind.GAVE_UP if isinstance(error, GaveUpError) else EventKind.FAILED
            about = {"node": socket.gethostname(), "lost_partner": lost_a_partner(error)}
            events(kind, message=str(error), error=type(error).__name__, **about)
            raise
        finally:
            watchdog.close()
    return DONE if finished else STOPPED


def compose(
    config: RunConfig,
    output: Path,
    initialize: Initialize | None,
    reader: BatchReader,
    context: DistributedContext,
    events: EventLog,
    watchdog: Watchdog,
    interruption: Interruption,
) -> tuple[LoopParts, int, tuple[Segment, ...]]:
    """All parts of the loop, the step that the newest checkpoint says to start from, and the run's segments."""
    task, training = task_of(config), config.training
    task.check_reader(reader)
    schedule = resolve_schedule(
        config.schedule, config.optimizer, batch_size=training.batch_size, epoch_samples=reader.epoch_samples
    )
    if initialize is None and config.initialize_from is not None:
        initialize = partial(
            _initialize_from,
            path=config.initialize_from,
            classes=reader.classes,
            report=events,
            leader=context.leader,
        )

    if task.begins:
        initialize = partial(_begin, then=initialize)

    def settings_of(module: nn.Module) -> dict[str, object]:
        return settings_for(module, training, config.optimizer.clip_grad, config.deepspeed, context)

    built = build(
        partial(module_of, config, classes=reader.num_classes),
        settings_of,
        None if context.from_leader(lambda: bool(complete_checkpoints(output))) else initialize,
        training=training,
        context=context,
    )
    module, recompute = built.module, config.model.recompute
    if isinstance(recompute, RecomputeBudget):
        rows = rows_per_rank(training.batch_size, training.accumulation, context.world_size)
        width = compute_dtype(training.precision).itemsize
        module.recompute_within(recompute.budget_gb, config.data.image_size, rows=rows, width=width)
    if config.model.compile:
        from pretrain.models import compilation  # imports the models

        for part in (module, built.teacher):
            if part is not None:
                compilation.compile_regions(part)
    if module.teacher_names() and not training.ema.enabled:
        raise UserError(
            f"task {task.name} learns from a momentum teacher here: set training.ema.enabled to true, or choose a "
            "task.preset without one (clip, simmim)"
        )
    shapes = {name: full_shape(p) for name, p in module.named_parameters() if p.requires_grad}
    engine = Engine(
        module,
        parameter_groups(shapes, config.optimizer, module.backbone()),
        built.settings,
        optimizer=config.optimizer,
        training=training,
        compiled=config.model.compile,
        context=context,
    )
    built.start_exactly(engine.held)
    ema = Ema(engine.owned, engine.offload_folder) if training.ema.enabled else None
    teacher = _teacher(built, engine, ema, context)
    checkpointer = Checkpointer(
        output,
        config.checkpoint,
        engine,
        ema,
        context,
        events,
        config_text=dump_config(config),
        trained_on=TrainedOn.of(reader),
    )
    kept = context.from_leader(lambda: read_policy(output))
    policy = DivergencePolicy(training.policy, output, kept, leader=context.leader)
    state = checkpointer.restore()
    meter = Meter(context, training.batch_size, training.precision, module.loss_weights())
    start = int(state["step"]) if state is not None else 0
    segments = segments_of(config, from_json(state["segments"]) if state is not None else (), start)
    if state is not None:
        policy.load(state["policy"])
        meter.load(state.get("meter"))
    if context.leader:
        write_segments(output, segments)
        events(
            EventKind.START if state is None else EventKind.RESUME,
            step=start,
            ranks=context.world_size,
            stage=engine.stage,
            total_steps=schedule.total_steps,
        )
    plain = config.model_dump(mode="json")
    log = RunLog(output, start, schedule.total_steps, training, plain, module.alarms, events, context)
    if context.leader:
        for notice in module.notices():
            events(EventKind.NOTICE, step=start, message=notice)
            log.progress.say(f"note: {notice}")
    replaced = context.from_leader(lambda: replaced_before(state, output, start))
    validation = None
    if config.evaluation.every_steps is not None:
        validation = Validation(
            output,
            config,
            reader,
            engine,
            ema,
            context,
            events,
            watchdog,
            interruption,
            start=start,
            total_steps=schedule.total_steps,
        )
    parts = LoopParts(
        settings=training,
        schedule=schedule,
        reader=reader,
        engine=engine,
        ema=ema,
        teacher=teacher,
        checkpointer=checkpointer,
        policy=policy,
        context=context,
        meter=meter,
        times=RankTimes(context, lambda message: events(EventKind.STRAGGLER, message=message)),
        interruption=interruption,
        watchdog=watchdog,
        events=events,
        log=log,
        bad_samples=BadSampleMonitor(reader, context, replaced),
        validation=validation,
    )
    return parts, start, segments


def _teacher(
    built: Built, engine: Engine, ema: Ema | None, context: DistributedContext
) -> WholeTeacher | PartitionedTeacher | None:
    if built.teacher is None or ema is None:
        return None
    return build_teacher(built.teacher, built.module.teacher_names(), engine, ema, context)


def _begin(module: TaskModule, then: Initialize | None) -> None:
    module.begin()
    if then is not None:
        then(module)


def _initialize_from(
    module: TaskModule, path: str, classes: tuple[str, ...] | None, report: EventLog, leader: bool
) -> None:
    from pretrain.training.initialize import initialize_from  # imports the models

    fresh = initialize_from(module, path, classes)
    if leader:
        report(EventKind.INITIALIZED, source=path, kept_fresh=fresh)
        print(f"started from {path}; fresh: {first_ten(fresh) or 'nothing'}", file=sys.stderr, flush=True)
