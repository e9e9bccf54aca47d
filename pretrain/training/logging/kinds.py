"""The kinds of events in events.jsonl, all of them, and which are good or bad news; prefixes in metrics.jsonl."""

from enum import StrEnum

from data_pipeline.reading import events

LOSS, WEIGHTED = "loss/", "weighted/"  # a part of the loss as its objective gives it, and as it counts in the total


class EventKind(StrEnum):
    START = "start"
    RESUME = "resume"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"
    GAVE_UP = "gave_up"
    NOTICE = "notice"
    ALARM = "alarm"
    INITIALIZED = "initialized"
    CONFIG_CHANGED = "config_changed"
    CHECKPOINT = "checkpoint"
    CHECKPOINT_FAILED = "checkpoint_failed"
    CHECKPOINT_REFUSED = "checkpoint_refused"
    COPIED = "checkpoint_copied"
    COPY_FAILED = "checkpoint_copy_failed"
    FAST_FOLDER_FAILED = "fast_folder_failed"
    VALIDATED = "validated"
    SYNCHRONOUS_CHECKPOINTS = "synchronous_checkpoints"
    STEP_NOT_APPLIED = "step_not_applied"
    ROLLBACK = "rollback"
    STRAGGLER = "straggler"
    HANG = "hang"
    GRACE_EXCEEDED = "grace_exceeded"
    BAD_SAMPLE = events.BAD_SAMPLE  # these four come from the reader
    INCOMPLETE_SAMPLE = events.INCOMPLETE_SAMPLE
    DAMAGED_SHARD = events.DAMAGED_SHARD
    INEXACT_ORDER = events.INEXACT_ORDER


GOOD = frozenset((EventKind.CHECKPOINT, EventKind.VALIDATED, EventKind.DONE))
BAD = frozenset(
    (
        *(EventKind.FAILED, EventKind.GAVE_UP, EventKind.ALARM, EventKind.CHECKPOINT_FAILED),
        *(EventKind.CHECKPOINT_REFUSED, EventKind.STEP_NOT_APPLIED, EventKind.ROLLBACK, EventKind.HANG),
        *(EventKind.COPY_FAILED, EventKind.FAST_FOLDER_FAILED),
        *(EventKind.STRAGGLER, EventKind.GRACE_EXCEEDED, EventKind.BAD_SAMPLE, EventKind.DAMAGED_SHARD),
    )
)
