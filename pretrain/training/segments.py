"""The segments of a run: from which step on it had which batch size and which weights of the mixture.

A checkpoint's state has those of its steps; RUN/segments.json has those of the run as it goes on, for people and for
`internimage inspect batch`. What a segment means stands in data_pipeline/reading/order/course.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.durable import write_durably
from data_pipeline.errors import UserError
from data_pipeline.reading.order.course import Segment, go_on
from pretrain.configuration import RunConfig

SEGMENTS = "segments.json"


def segments_of(config: RunConfig, earlier: Sequence[Segment], step: int) -> tuple[Segment, ...]:
    """Those of a run that goes on from `step` as `config` says. Raises UserError where its length is in epochs."""
    weights = [source.weight for source in config.data.sources]
    found = go_on(earlier, step, config.training.batch_size, weights)
    sizes = {segment.batch_size for segment in found}
    if len(sizes) > 1 and (config.schedule.epochs is not None or config.schedule.warmup_epochs):
        raise UserError(
            "training.batch_size changes within this run, and an epoch of schedule.epochs would be of another number "
            "of steps: give schedule.steps and schedule.warmup_steps (--allow-change schedule), counted as they stand"
        )
    return found


def as_json(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    return [asdict(segment) for segment in segments]


def from_json(entries: Sequence[Mapping[str, Any]]) -> tuple[Segment, ...]:
    return tuple(Segment(int(e["step"]), int(e["batch_size"]), tuple(e["weights"])) for e in entries)


def write_segments(run: Path, segments: Sequence[Segment]) -> None:
    """A run of one segment needs no file, but has one once it had several."""
    if len(segments) > 1 or (run / SEGMENTS).exists():
        write_durably(run / SEGMENTS, json.dumps(as_json(segments), indent=1) + "\n")


def read_segments(run: Path) -> tuple[Segment, ...]:
    """() where the run has had one throughout, as its configuration says."""
    path = run / SEGMENTS
    return from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else ()
